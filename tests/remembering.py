"""An encoder without weights for stores, and what a file must not hold any more."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WIDTH = 256


class HashedWords:
    """Words and their beginnings hashed to 256 places: alike where words are shared. Quick, and the same everywhere."""

    def __init__(self, width: int = WIDTH, name: str = "hashed-words") -> None:
        self.name, self.width = name, width

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """A unit vector a text."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()) or ["-"]:
                for part in {word, *(word[:end] for end in (3, 4, 5))}:
                    row[zlib.crc32(part.encode()) % self.width] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Words of each text."""
        return [len(text.split()) for text in texts]


def left_of(secret: str, folder: Path, shortest: int = 6) -> dict[str, list[str]]:
    """The secret's words, and pieces of 12 letters of it, that are still in a file of the folder, by file."""
    words = {word for word in secret.split() if len(word) >= shortest}
    pieces = {secret[i : i + 12] for i in range(max(1, len(secret) - 11))}
    wanted = [piece.encode() for piece in sorted({secret, *words, *pieces})]
    wanted += [word.lower().encode() for word in words]
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            here = [piece.decode() for piece in wanted if piece in content]
            if here:
                found[path.name] = here
    return found


def unit(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Random unit vectors."""
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TOPICS = "garden kitchen harbour library mountain station theatre orchard workshop museum".split()
DOINGS = "painted repaired visited measured described forgot admired photographed".split()


def turns(count: int) -> list[tuple[str, str]]:
    """A made-up conversation, the same every time."""
    places = itertools.islice(itertools.cycle(itertools.product(TOPICS, DOINGS)), count)
    return [
        (f"Today I {did} the {place} number {i}.", f"Tell me more about the {place}.")
        for i, (place, did) in enumerate(places)
    ]
