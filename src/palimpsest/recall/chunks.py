"""Texts as sentences and as chunks that an encoder reads whole: slices that joined again are the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Lengths = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text."""


def sentences(text: str) -> list[str]:
    """The sentences with the space behind each: they end at . ! ? before a space, and at the end of a line."""
    return re.findall(r".+?(?:[.!?]+[\"')\]]*(?=\s)|\n|\Z)\s*", text, re.S) or [text]


def chunks(text: str, limit: int, lengths: Lengths) -> list[str]:
    """The text where it has at most `limit` tokens, else parts that end with a sentence; longer ones with a word."""
    if lengths([text])[0] <= limit:
        return [text]
    parts = sentences(text)
    sizes = lengths(parts)
    pieces = [
        word
        for part, size in zip(parts, sizes, strict=True)
        for word in ([part] if size <= limit else re.findall(r"\s*\S+\s*", part) or [part])
    ]
    found, used = [""], 0
    for piece, size in zip(pieces, lengths(pieces), strict=True):
        if used and used + size > limit:
            found.append("")
            used = 0
        found[-1] += piece
        used += size
    return found
