"""Next-token distributions with few tokens each, one a scored token: sparse, never [targets, vocabulary].

    entries of row i are starts[i] to starts[i + 1];  rows of sequence s are offsets[s] to offsets[s + 1]

Probabilities are kept in float16, where the smallest vanish; a row that is read is divided by its sum. They are carried
through a training by the numbers of the sequences, as reference values are: `targets.of(batch.train.index, ...)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError
from palimpsest.statistics.stored import read_tensors, write_tensors

FORM = "palimpsest-targets-1"


@dataclasses.dataclass(frozen=True)
class Soft:
    """The entries of some targets: which target, which token, what share; the shares of a target sum to one."""

    row: Int[Tensor, " entries"]
    token: Int[Tensor, " entries"]
    share: Float[Tensor, " entries"]


@dataclasses.dataclass(frozen=True)
class SparseTargets:
    """The distributions of all scored tokens of some sequences, and the tokens themselves (`labels`).

    `repeated` counts rows that have another one at distance zero.
    """

    starts: Int[Tensor, " rows+1"]
    tokens: Int[Tensor, " entries"]
    probabilities: Float[Tensor, " entries"]
    labels: Int[Tensor, " rows"]
    offsets: Int[Tensor, " sequences+1"]
    vocabulary: int
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(
        cls, parts: Sequence[scipy.sparse.csr_array], labels: Tensor, offsets: Tensor, repeated: int = 0
    ) -> SparseTargets:
        """The blocks of rows one after the other."""
        counts = np.concatenate([np.diff(part.indptr) for part in parts])
        return cls(
            starts=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
            tokens=torch.from_numpy(np.concatenate([part.indices for part in parts])).to(torch.int32),
            probabilities=torch.from_numpy(np.concatenate([part.data for part in parts])).half(),
            labels=labels.to(torch.int32),
            offsets=offsets.long(),
            vocabulary=parts[0].shape[1],
            repeated=repeated,
        )

    @property
    def csr(self) -> scipy.sparse.csr_array:
        """All rows as one sparse matrix [rows, vocabulary]; rows sum to one."""
        soft = self._soft(torch.arange(len(self)))
        return scipy.sparse.csr_array(
            (soft.share.numpy(), (soft.row.numpy(), soft.token.numpy())), shape=(len(self), self.vocabulary)
        )

    def of(self, index: Int[Tensor, " batch"], labels: Int[Tensor, " targets"]) -> Soft:
        """The entries of the sequences with these numbers, one sequence after the other.

        Raises where a sequence has none, or where its scored tokens are not those that the entries were made for.
        """
        device, index = index.device, index.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self.offsets) - 1:
            raise PalimpsestError(
                f"there are targets for {len(self.offsets) - 1} sequences, none for number {int(index.max())}."
            )
        chosen = ranges(self.offsets, index)[1]
        if not torch.equal(self.labels[chosen].long(), labels.cpu().long()):
            raise PalimpsestError("the targets were made for other tokens than those of the batch.")
        soft = self._soft(chosen)
        return Soft(soft.row.to(device), soft.token.to(device), soft.share.to(device))

    def _soft(self, chosen: Int[Tensor, " targets"]) -> Soft:
        row, place = ranges(self.starts, chosen)
        share = self.probabilities[place].float()
        total = torch.zeros(len(chosen)).index_add_(0, row, share)
        return Soft(row, self.tokens[place].long(), share / total[row])

    @property
    def likeliest(self) -> Float[Tensor, " rows"]:
        """The largest probability of each row."""
        return torch.from_numpy(np.maximum.reduceat(self.probabilities.float().numpy(), self.starts[:-1].numpy()))

    def noticeable(self, least: float = 0.01) -> Int[Tensor, " rows"]:
        """How many tokens of each row have at least that probability."""
        row, _ = ranges(self.starts, torch.arange(len(self)))
        return torch.bincount(row[self.probabilities.float() >= least], minlength=len(self))

    def save(self, path: str | Path, facts: Mapping[str, str] | None = None) -> Path:
        """Writes the targets to a file."""
        tensors = {
            field.name: x for field in dataclasses.fields(self) if isinstance(x := getattr(self, field.name), Tensor)
        }
        numbers = {"vocabulary": str(self.vocabulary), "repeated": str(self.repeated)}
        return write_tensors(path, tensors, {"format": FORM, **numbers, **(facts or {})})

    @classmethod
    def load(cls, path: str | Path) -> SparseTargets:
        """Saved targets; raises where the file is missing, damaged or another kind."""
        tensors, facts = read_tensors(path, FORM, "targets")
        return cls(**tensors, vocabulary=int(facts["vocabulary"]), repeated=int(facts["repeated"]))


def ranges(bounds: Int[Tensor, " n+1"], chosen: Int[Tensor, " m"]) -> tuple[Int[Tensor, " e"], Int[Tensor, " e"]]:
    """Of the chosen intervals of `bounds`: all their members, and to which of the chosen each belongs."""
    first, count = bounds[chosen], bounds[chosen + 1] - bounds[chosen]
    owner = torch.arange(len(chosen)).repeat_interleave(count)
    before = torch.cumsum(count, 0) - count
    return owner, torch.arange(len(owner)) - before[owner] + first[owner]


def sparse(weights: Float[Tensor, "rows k"], tokens: Int[Tensor, "rows k"], vocabulary: int) -> scipy.sparse.csr_array:
    """The weights of equal tokens added up, as a sparse matrix; what float16 cannot hold is left out."""
    rows, k = weights.shape
    place = np.repeat(np.arange(rows), k)
    found = scipy.sparse.csr_array(
        (weights.double().numpy().ravel(), (place, tokens.numpy().ravel())), shape=(rows, vocabulary)
    )
    found.sum_duplicates()
    found.data[found.data.astype(np.float16) == 0] = 0
    found.eliminate_zeros()
    return found
