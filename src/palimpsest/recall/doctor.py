"""What is wrong with a store, and what only takes up room."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

import numpy as np
from jaxtyping import Float

from palimpsest.recall import reading
from palimpsest.recall.items import Items

ALIKE = 0.95
FEWEST_WORDS = 3
COMPARED = 20_000
"""The newest chunks that are compared with each other."""
BLOCK = 2_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """`problems` are damage; the rest is counted so that somebody may decide."""

    problems: tuple[str, ...]
    memories: int
    current: int
    faded: int
    superseded: int
    expired: int
    duplicates: int
    near_duplicates: int
    short: int
    history: int
    bytes: int


def examined(items: Items) -> Health:
    """The health of what the scope sees; damage is looked for in the whole store."""
    engine, now = items.opened.engine, time.time()
    found = items.all("all")
    expired = [m for m in found if m.expires is not None and m.expires <= now]
    current = [m for m in found if not m.faded and m.ended is None and m not in expired]
    texts = Counter(m.text for m in current)
    numbers = engine.ages(items.sight()).number[-COMPARED:].tolist()
    return Health(
        problems=tuple(engine.problems()),
        memories=len(found),
        current=len(current),
        faded=sum(m.faded for m in found),
        superseded=sum(m.ended is not None for m in found),
        expired=len(expired),
        duplicates=sum(count - 1 for count in texts.values()),
        near_duplicates=near_pairs(engine.vectors(numbers), ALIKE) if numbers else 0,
        short=sum(len(text.split()) < FEWEST_WORDS for text in texts),
        history=len(reading.history(engine, items.scope)),
        bytes=engine.bytes(),
    )


def near_pairs(vectors: Float[np.ndarray, "chunks width"], alike: float) -> int:
    """How many chunks have an earlier one with at least this cosine; a block of rows at a time."""
    count = 0
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK]
        scores = rows @ vectors[: start + len(rows)].T
        earlier = np.arange(scores.shape[1])[None, :] < np.arange(start, start + len(rows))[:, None]
        count += int(((scores >= alike) & earlier).any(axis=1).sum())
    return count
