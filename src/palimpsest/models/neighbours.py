"""Nearest neighbours among stored hidden states, and the next-token distribution that they give (kNN-LM).

    K, V    keys, values   [rows, width], [rows]   a hidden state, and the token that followed it
    x       query          [width]
    d_j                    squared Euclidean distance of x to K_j
    k, tau  temperature    how many neighbours count, and how sharply

    w_j = softmax_j(-d_j / tau) over the k nearest rows,   p(y) = sum of w_j over those with V_j = y

Up to a million rows the search is exact, by matrix products: on a CPU those of torch are 5 to 9 times as fast as the
search of faiss's `IndexFlatL2`, which finds the same. Above that it is faiss's inverted file with product quantisation.
Either way the distances are computed again from the stored keys: what a search returns then depends neither on how many
queries are asked together nor on how the index rounds. Keys are kept in float16 and compared in float32.

Source: Khandelwal et al. 2020 (arXiv 1911.00172); the settings of the index follow the code of Cao et al. 2025
(arXiv 2508.09874).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError

EXACT_UP_TO = 1_000_000
"""Rows from which on the index is approximate."""
SLACK = 8
"""Rows that are searched beyond those asked for: a search rounds, and the order is decided by exact distances."""
TRAINED_ON, CHUNKS, PROBES = 1_000_000, 1_000, 32
"""Keys, and contiguous pieces of the corpus, from which an approximate index learns; lists that a search looks into."""
AT_ONCE = 1 << 24
"""Numbers held at once while distances are computed: memory, not result."""
FLOOR = -1e4
"""Log-probability of a token that no neighbour has."""


class Neighbours:
    """The stored rows with an index over their keys; they never change."""

    def __init__(
        self,
        keys: Any,
        values: Any,
        *,
        exact_up_to: int = EXACT_UP_TO,
        exact_distances: bool = True,
        index: Any = None,
    ) -> None:
        if not len(keys):
            raise PalimpsestError("the datastore is empty: it has no keys.")
        if len(keys) != len(values):
            raise PalimpsestError(f"the datastore has {len(keys)} keys and {len(values)} values.")
        self.keys: Tensor = keys if isinstance(keys, Tensor) else torch.from_numpy(keys)
        self.values: Tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
        self.exact_distances = exact_distances
        self.exact = index is None and len(keys) <= exact_up_to
        self._index = index
        self._whole: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __deepcopy__(self, memo: dict[int, Any]) -> Neighbours:
        return self

    @property
    def width(self) -> int:
        """Numbers a key."""
        return self.keys.shape[1]

    @property
    def index(self) -> Any:
        """The approximate index of faiss, made when it is first needed; an exact search has none."""
        if self._index is None and not self.exact:
            self._index = _quantised(self.keys)
        return self._index

    def search(
        self, queries: Float[Tensor, "queries width"], k: int, exclude: Int[Tensor, " queries"] | None = None
    ) -> tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]:
        """Squared distances and row numbers of the k nearest keys, nearest first, equal ones in order of rows; of more
        than `SLACK` rows beyond the k-th that are as near as it, which ones come back is the search's.

        `exclude` names a row for each query that does not count, wherever the index finds it: its own. Where an
        approximate index finds fewer rows the distance is infinite and the row -1.
        """
        self._check(queries, k, exclude is not None)
        queries = queries.detach().float().cpu()
        wanted = min(len(self), k + SLACK + (exclude is not None))
        if self.exact:
            rows = self._nearest(queries, wanted)
            near = self._distances(queries, rows)
        else:
            near, rows = (torch.from_numpy(x) for x in self.index.search(_plain(queries), wanted))
            near = self._distances(queries, rows.clamp_min(0)) if self.exact_distances else near
        lost = rows < 0
        if exclude is not None:
            lost |= rows == exclude.cpu()[:, None]
        near, rows = near.masked_fill(lost, math.inf), rows.masked_fill(lost, -1)
        rows, order = rows.sort(dim=1, stable=True)
        near, again = near.gather(1, order).sort(dim=1, stable=True)
        if torch.isinf(near[:, 0]).any():
            raise PalimpsestError(
                f"the approximate index found no neighbour for {int(torch.isinf(near[:, 0]).sum())} queries: let it "
                "look into more lists (index.nprobe)."
            )
        return near[:, :k], rows.gather(1, again)[:, :k]

    def _nearest(self, queries: Tensor, wanted: int) -> Int[Tensor, "queries wanted"]:
        """Rows of the least |K|^2 - 2 x K, from which the squared distance differs by |x|^2; in no order."""
        if self._whole is None:
            keys = self.keys.to(torch.float32, copy=True)  # float32 keys are the caller's
            mean = keys.mean(0)  # taken off, so that products round less
            keys -= mean
            self._whole = mean, keys, keys.square().sum(1)
        mean, keys, norms = self._whole
        parts = (queries - mean).split(max(1, AT_ONCE // len(self)))
        room = keys.new_empty(len(parts[0]), len(self))
        found = []
        for part in parts:
            apart = torch.addmm(norms, part, keys.T, alpha=-2, out=room[: len(part)])
            found.append(apart.topk(wanted, 1, largest=False, sorted=False).indices)
        return torch.cat(found)

    def _distances(self, queries: Tensor, rows: Int[Tensor, "queries found"]) -> Float[Tensor, "queries found"]:
        step = max(1, AT_ONCE // (4 * rows.shape[1] * self.width))
        parts = zip(queries.split(step), rows.split(step), strict=True)
        return torch.cat([(self.keys[r].float() - q[:, None]).square_().sum(-1) for q, r in parts])

    def _check(self, queries: Tensor, k: int, excluding: bool) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise PalimpsestError(
                f"the queries are {queries.shape[-1]} wide and the keys of the datastore {self.width}: it was made "
                "with another model, or at another place of this one."
            )
        check_asked(k, 1.0, len(self) - excluding)


def _plain(keys: Tensor) -> np.ndarray:
    return np.ascontiguousarray(keys.float().numpy())


def _quantised(keys: Tensor) -> Any:
    """Lists and bytes a key grow with the rows and divide the width; trained on pieces spread over the corpus."""
    import faiss

    rows, width = keys.shape
    lists = max(1, min(round(4 * math.sqrt(rows)), rows // 39))  # faiss wants 39 keys a list
    parts = max(m for m in range(1, min(64, width) + 1) if width % m == 0)
    quantiser = faiss.IndexFlatL2(width)
    index = faiss.IndexIVFPQ(quantiser, width, lists, parts, 8)
    index.nprobe = min(PROBES, lists)
    pieces = min(CHUNKS, max(1, rows // 256))
    length = min(rows, TRAINED_ON) // pieces
    starts = np.linspace(0, rows - length, pieces).astype(int)
    index.train(_plain(torch.cat([keys[start : start + length] for start in starts])))
    for block in keys.split(100_000):
        index.add(_plain(block))
    return index


def index_bytes(index: Any) -> Tensor:
    """The index as bytes."""
    import faiss

    return torch.from_numpy(faiss.serialize_index(index))


def index_of(data: Tensor) -> Any:
    """The index that the bytes are."""
    import faiss

    return faiss.deserialize_index(data.cpu().numpy())


def check_asked(k: int, temperature: float, rows: int) -> None:
    """Raises where a datastore of so many rows does not have k neighbours, or the temperature is none."""
    if not 1 <= k <= rows:
        raise PalimpsestError(f"k is {k}, expected 1 to {rows}, the rows of the datastore that can be neighbours.")
    if not temperature > 0:
        raise PalimpsestError(f"temperature is {temperature:g}, expected above 0.")


def closeness(distances: Float[Tensor, "queries k"], temperature: float) -> Float[Tensor, "queries k"]:
    """w: the weight of each neighbour; rows sum to one. An infinite distance has none."""
    check_asked(1, temperature, 1)
    # the nearest is subtracted first, so that rounding is that of differences, however far all of them are
    return (-(distances - distances.amin(1, keepdim=True)) / temperature).softmax(1)


def distribution(
    weights: Float[Tensor, "queries k"], tokens: Int[Tensor, "queries k"], vocabulary: int
) -> Float[Tensor, "queries vocabulary"]:
    """p: the weights of neighbours with the same token added up."""
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        wrong = int(tokens.max() if tokens.min() >= 0 else tokens.min())
        raise PalimpsestError(f"the datastore holds the token {wrong}, expected 0 to {vocabulary - 1}.")
    found = weights.new_zeros(len(weights), vocabulary).scatter_add_(1, tokens.long(), weights)
    return found / found.sum(1, keepdim=True)
