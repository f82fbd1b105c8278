"""Unit vectors in memory beside what decides whether they may be seen: exact search, and by cells where there are many.

    vectors   [chunks width]   float32, length 1, in the order of their numbers
    score     [chunks]         vectors @ query: the cosine

The ranking is that of float64 cosines: the best by float32 (of many, by vectors rounded to 8 bits) are computed again,
of equal ones the newest turn comes first, then the lower number. With very many vectors, faiss finds about 4 sqrt(N)
centres; a search then looks only into the cells whose centres are nearest to the query, and what it finds there is
exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from palimpsest.recall.memories import Ages, Sight
from palimpsest.recall.rounded import RoundedVectors

COLUMNS: Mapping[str, Any] = {
    "number": np.int64,
    "head": np.int64,
    "scope": np.int64,
    "turn": np.int64,
    "last_retrieved": np.int64,
    "happened": np.float64,
    "ended": np.float64,
    "expires": np.float64,
    "faded": np.bool_,
    "pinned": np.bool_,
    "cell": np.int32,
}
"""What is known of each chunk; `ended` and `expires` are infinite where it has neither, `cell` -1 where it has none."""
SLACK = 1e-4
"""More than float32 cosines can be wrong by."""
ROUNDED_FROM = 20_000
"""Visible chunks from which on a look at rounded vectors comes first (measured: half the time at 100,000)."""
PER_CENTRE = 39
"""Vectors a centre below which faiss warns."""
CENTRES = 4
"""Centres for the square root of the number of vectors."""
PROBED = 32
"""Cells that a search looks into: the paper's nprobe."""


class VectorIndex:
    """A growing table of chunks; numbers only grow, so that a place is found by bisection."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.size = 0
        self.centres: Float[np.ndarray, "cells width"] | None = None
        self._columns = {name: np.empty(0, kind) for name, kind in COLUMNS.items()}
        self._vectors = np.empty((0, width), np.float32)
        self._rounded = RoundedVectors(width)

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column][: self.size]

    @property
    def vectors(self) -> Float[np.ndarray, "chunks width"]:
        """All vectors, in the order of their numbers."""
        return self._vectors[: self.size]

    def of(self, numbers: Sequence[int]) -> Float[np.ndarray, "chunks width"]:
        """The vectors of chunks; zero for one that is not there."""
        wanted = np.asarray(numbers, np.int64)
        there = np.isin(wanted, self["number"])
        found = np.zeros((len(wanted), self.vectors.shape[1]), np.float32)
        found[there] = self.vectors[np.searchsorted(self["number"], wanted[there])]
        return found

    def put(self, columns: Mapping[str, np.ndarray], vectors: Float[np.ndarray, "new width"]) -> None:
        """Adds chunks in ascending order of their numbers, or replaces those that are already there."""
        number = columns["number"]
        last = self["number"][-1] if self.size else -1
        known = number <= last
        needed = self.size + int((~known).sum())
        if needed > len(self._vectors):
            self.reserve(max(needed, 2 * len(self._vectors)))
        places: Any = slice(self.size, needed)  # all new, as when a store is opened: no row is looked for
        if known.any():
            places = np.where(known, np.searchsorted(self["number"], number), 0)
            places[~known] = np.arange(self.size, needed)
            if not np.array_equal(self._vectors[places[known]], vectors[known]):
                self._rounded = RoundedVectors(self.width)
        for name, column in self._columns.items():
            column[places] = columns[name]
        self._vectors[places] = vectors
        self.size = needed

    def reserve(self, size: int) -> None:
        """Makes room for that many chunks."""
        if size <= len(self._vectors):
            return
        for name, column in self._columns.items():
            self._columns[name] = np.empty(size, column.dtype)
            self._columns[name][: self.size] = column[: self.size]
        vectors = np.empty((size, self.width), np.float32)
        vectors[: self.size] = self.vectors
        self._vectors = vectors

    def keep(self, numbers: Int[np.ndarray, " kept"]) -> None:
        """Drops all other chunks."""
        chosen = np.isin(self["number"], numbers)
        if chosen.all():
            return
        self._columns = {name: column[: self.size][chosen] for name, column in self._columns.items()}
        self._vectors = self.vectors[chosen]
        self._rounded = RoundedVectors(self.width)
        self.size = int(chosen.sum())

    def visible(self, sight: Sight, scopes: Int[np.ndarray, " scopes"] | None) -> Bool[np.ndarray, " chunks"]:
        """Which chunks the sight shows; `scopes` are the numbers of its scopes, None for any."""
        mask = np.ones(self.size, bool) if scopes is None else self._of(scopes)
        if sight.as_of is not None:
            mask &= ~self["faded"] & (self["happened"] <= sight.as_of) & (self["ended"] > sight.as_of)
            mask &= self["expires"] > sight.as_of
        elif sight.view == "current":
            mask &= ~self["faded"] & np.isinf(self["ended"]) & (self["expires"] > sight.now)
        if sight.without:
            mask &= ~np.isin(self["number"], np.fromiter(sight.without, np.int64))
        return mask

    def _of(self, scopes: Int[np.ndarray, " scopes"]) -> Bool[np.ndarray, " chunks"]:
        # comparing with one is ten times as quick as looking for it among several
        return self["scope"] == scopes[0] if len(scopes) == 1 else np.isin(self["scope"], scopes)

    def ages(self, mask: Bool[np.ndarray, " chunks"]) -> Ages:
        """What salience is computed from, of the chosen chunks."""
        return Ages(self["number"][mask], self["turn"][mask], self["last_retrieved"][mask], self["pinned"][mask])

    def nearest(
        self, query: Float[np.ndarray, " width"], limit: int, mask: Bool[np.ndarray, " chunks"]
    ) -> list[tuple[int, float]]:
        """Numbers and cosines of the best visible chunks."""
        rows = self._candidates(query, mask)
        if not len(rows):
            return []
        if len(rows) <= ROUNDED_FROM:
            whole = 4 * len(rows) > self.size  # gathering few rows is cheaper than multiplying all
            scores = (self.vectors @ query)[rows] if whole else self.vectors[rows] @ query
            if len(rows) > limit:
                worst = np.partition(scores, len(rows) - limit)[len(rows) - limit]
                rows = rows[scores >= worst - SLACK]
            return self._ranked(query, rows, limit)
        self._rounded.follow(self.vectors)
        count = 8 * limit + 256
        while True:
            near, bound = self._rounded.best(query, count, mask)
            found = self._ranked(query, near, limit)
            if len(found) < limit or found[-1][1] > bound + SLACK or count >= len(rows):
                return found
            count = min(8 * count, len(rows))  # too close to call: look at more

    def alike(
        self, query: Float[np.ndarray, " width"], least: float, mask: Bool[np.ndarray, " chunks"]
    ) -> list[tuple[int, float]]:
        """Numbers and cosines of all visible chunks with at least that cosine, best first; no cell is left out."""
        rows = np.flatnonzero(mask & (self.vectors @ query >= least - SLACK))
        return [pair for pair in self._ranked(query, rows, len(rows)) if pair[1] >= least]

    def _ranked(
        self, query: Float[np.ndarray, " width"], rows: Int[np.ndarray, " rows"], limit: int
    ) -> list[tuple[int, float]]:
        exact = np.einsum("nd,d->n", self.vectors[rows].astype(np.float64), query.astype(np.float64))
        exact = exact.round(12)  # equal vectors tie wherever in memory they lie
        order = np.lexsort((self["number"][rows], -self["turn"][rows], -exact))[:limit]
        return [(int(self["number"][rows[i]]), float(exact[i])) for i in order]

    def _candidates(self, query: Float[np.ndarray, " width"], mask: Bool[np.ndarray, " chunks"]) -> np.ndarray:
        """Rows worth scoring: all visible ones, or those in the nearest cells (and those that have no cell)."""
        if self.centres is None:
            return np.flatnonzero(mask)
        near = np.zeros(len(self.centres) + 1, bool)  # the last entry is what cell -1 finds
        probed = min(PROBED, len(self.centres))
        near[np.argpartition(self.centres @ query, -probed)[-probed:]] = True
        near[-1] = True
        found = np.flatnonzero(near[self["cell"]] & mask)
        return found if len(found) else np.flatnonzero(mask)

    def cell_of(self, vectors: Float[np.ndarray, "new width"]) -> Int[np.ndarray, " new"]:
        """The cell of each vector, -1 where there are no cells."""
        if self.centres is None:
            return np.full(len(vectors), -1, np.int32)
        blocks = np.array_split(vectors, max(1, math.ceil(len(vectors) / 8192)))
        return np.concatenate([np.argmax(block @ self.centres.T, axis=1) for block in blocks]).astype(np.int32)

    def fill_cells(self) -> None:
        """Gives a cell to the chunks that have none, where there are cells."""
        if self.centres is not None and len(without := np.flatnonzero(self["cell"] < 0)):
            self["cell"][without] = self.cell_of(self.vectors[without])

    def find_centres(self) -> Float[np.ndarray, "cells width"]:
        """About 4 sqrt(N) centres of the vectors, by faiss's spherical k-means on a part of them."""
        import faiss

        count = max(1, min(round(CENTRES * math.sqrt(self.size)), self.size // PER_CENTRE))
        means = faiss.Kmeans(
            self.width, count, niter=5, seed=1, spherical=True, max_points_per_centroid=PER_CENTRE + 1, verbose=False
        )
        means.train(np.ascontiguousarray(self.vectors))
        return np.asarray(means.centroids, np.float32)


def columns_of(rows: list[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Columns of the index from rows in the order of `COLUMNS`; None becomes infinity, or -1 for a cell."""
    found = list(zip(*rows, strict=True)) if rows else [()] * len(COLUMNS)
    made = {}
    for (name, kind), values in zip(COLUMNS.items(), found, strict=True):
        if name in ("ended", "expires"):
            made[name] = np.array([math.inf if x is None else x for x in values], kind)
        elif name == "cell":
            made[name] = np.array([-1 if x is None else x for x in values], kind)
        else:
            made[name] = np.array(values, kind)
    return made
