"""Unit vectors rounded to 8 bits a number: a first look that reads a quarter of the memory, and knows how wrong it is.

    e'_i                    vector i as faiss's scalar quantiser keeps it
    delta = max_i |e_i - e'_i|
    <e_i, q> <= <e'_i, q> + delta        for |q| = 1, by Cauchy and Schwarz

So a vector that was left out because its rounded cosine is below b has a cosine of at most b + delta: where the exact
ones that were kept are above, nothing was missed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

BATCH = 8192


class RoundedVectors:
    """The rounded copy of an array of vectors that only grows."""

    def __init__(self, width: int) -> None:
        self.width, self.delta = width, 0.0
        self._index: Any = None

    @property
    def size(self) -> int:
        """How many vectors are in it."""
        return 0 if self._index is None else int(self._index.ntotal)

    def follow(self, vectors: Float[np.ndarray, "chunks width"]) -> None:
        """Takes in the vectors behind those that it has."""
        import faiss

        if self._index is None:
            quantiser = faiss.ScalarQuantizer.QT_8bit
            self._index = faiss.IndexScalarQuantizer(self.width, quantiser, faiss.METRIC_INNER_PRODUCT)
            self._index.train(vectors)
        for start in range(self.size, len(vectors), BATCH):
            part = np.ascontiguousarray(vectors[start : start + BATCH])
            self._index.add(part)
            kept = self._index.reconstruct_n(start, len(part))
            self.delta = max(self.delta, float(np.linalg.norm(part - kept, axis=1).max()))

    def best(
        self, query: Float[np.ndarray, " width"], count: int, mask: Bool[np.ndarray, " chunks"]
    ) -> tuple[Int[np.ndarray, " rows"], float]:
        """The visible rows with the largest rounded cosines, and what the cosine of no other visible row exceeds."""
        import faiss

        made: Any = faiss  # its annotations are those of C++, not of its Python functions
        how = {}
        if not mask.all():
            bits = np.packbits(mask, bitorder="little")
            how["params"] = made.SearchParameters(sel=made.IDSelectorBitmap(bits))
        scores, rows = self._index.search(query[None].astype(np.float32), count, **how)
        found = rows[0] >= 0
        bound = float(scores[0, -1]) + self.delta if found.all() else -math.inf
        return rows[0][found], bound
