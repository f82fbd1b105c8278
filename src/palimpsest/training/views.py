"""What an objective sees of a micro-batch: one view a role, computed when it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.labelled import Labelled, collate
from palimpsest.data.packing import Pack, Packed
from palimpsest.models.hooks import capture, places
from palimpsest.training.schedule import Micro, Schedule


@dataclasses.dataclass
class View:
    """One role's part of a micro-batch, after the forward pass.

    Everything per target is over all scored tokens of the role's sequences, one after the other. A classifier has one
    target an example: its label, predicted by `logits` [batch, labels].
    """

    index: Int[Tensor, " batch"]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    tokens_per_example: float
    even: float
    place: int
    forward: _Tokens | _Examples

    @cached_property
    def logits(self) -> Float[Tensor, "targets vocabulary"]:
        """Float32 logits that predict each target."""
        return self.forward.logits[self.place]

    @cached_property
    def log_probs(self) -> Float[Tensor, " targets"]:
        """Log-probability of each target, nats."""
        return -F.cross_entropy(self.logits, self.targets, reduction="none")

    @cached_property
    def count(self) -> Float[Tensor, " batch"]:
        """Scored tokens of each sequence."""
        return torch.bincount(self.owner, minlength=len(self.index)).to(torch.float32)

    @cached_property
    def nll(self) -> Float[Tensor, " batch"]:
        """S: summed negative log-likelihood of each sequence, nats."""
        return self.sum_tokens(-self.log_probs)

    @cached_property
    def mean_nll(self) -> Float[Tensor, " batch"]:
        """A: negative log-likelihood a token of each sequence, nats."""
        return self.nll / self.count

    @property
    def cross_entropy(self) -> Float[Tensor, ""]:
        """Token-weighted mean negative log-likelihood over the whole step (what a causal LM returns as its loss)."""
        return self.mean_tokens(-self.log_probs)

    def sum_tokens(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " batch"]:
        """Sums over the targets of each sequence."""
        return values.new_zeros(len(self.index)).index_add(0, self.owner, values)

    def mean_tokens(self, values: Float[Tensor, " targets"]) -> Float[Tensor, ""]:
        """This micro-batch's part of the mean over all targets of the step."""
        return values.sum() / (self.tokens_per_example * len(self.index))

    def mean_examples(self, values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        """This micro-batch's part of the mean over all sequences of the role in the step."""
        return values.sum() / self.even

    @property
    def nodes(self) -> Int[Tensor, " targets"]:
        """The flat place of each scored token itself among all tokens that the network is given."""
        return self.forward.nodes[self.place]

    @cached_property
    def hidden(self) -> Float[Tensor, "targets width"]:
        """The watched module's output at each scored token itself (not at the token before it).

        Of a classifier it is the module's whole output, [batch, ...].
        """
        return self.forward.hidden[self.place]


@dataclasses.dataclass
class _Tokens:
    """One forward pass over the sequences of all roles; another one, without logits, for a watched module."""

    network: Any
    packed: Packed
    watch: str | None
    targets: Sequence[int]

    # split, not sliced: on the way back slices are filled up with zeros to the whole, a vocabulary wide
    @cached_property
    def logits(self) -> Sequence[Float[Tensor, "targets vocabulary"]]:
        return self.packed.target_logits(self.network).split(self.targets)

    @property
    def nodes(self) -> Sequence[Int[Tensor, " targets"]]:
        return (self.packed.row * self.packed.tokens.shape[1] + self.packed.here).split(self.targets)

    @cached_property
    def hidden(self) -> Sequence[Float[Tensor, "targets width"]]:
        assert self.watch is not None
        bare = getattr(self.network, "module", self.network)
        with capture({self.watch: places(bare)[self.watch].module}) as outputs:
            self.network(**self.packed.inputs(), logits_to_keep=torch.zeros(1, dtype=torch.long))
        return outputs[self.watch][self.packed.row, self.packed.here].float().split(self.targets)


@dataclasses.dataclass
class _Examples:
    """One forward pass over the labelled examples of one role."""

    network: Any
    examples: Sequence[Labelled]
    watch: str | None
    device: torch.device

    @cached_property
    def _computed(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        inputs, _ = collate(self.examples, self.device)
        bare = getattr(self.network, "module", self.network)
        watched = {} if self.watch is None else {self.watch: places(bare)[self.watch].module}
        with capture(watched) as outputs:
            return self.network(**inputs).logits.float(), outputs

    @property
    def logits(self) -> Sequence[Float[Tensor, "batch labels"]]:
        return (self._computed[0],)

    @property
    def nodes(self) -> Sequence[Int[Tensor, " batch"]]:
        return (torch.arange(len(self.examples), device=self.device),)

    @property
    def hidden(self) -> Sequence[Float[Tensor, "batch ..."]]:
        assert self.watch is not None
        return (self._computed[1][self.watch].float(),)


class Batch:
    """A micro-batch: one `View` a role, as attributes.

    One forward pass serves all roles. For a classifier every role has its own, so that batch normalisation does not
    mix them; examples that should be normalised together belong into one role.
    """

    def __init__(self, views: Mapping[str, View]) -> None:
        self._views = dict(views)

    def __getattr__(self, role: str) -> View:
        if role.startswith("_") or role not in self._views:
            raise AttributeError(f"the batch has no role {role!r} (given: {', '.join(self._views)})")
        return self._views[role]

    def __contains__(self, role: str) -> bool:
        return role in self._views


def batch_of(
    network: Any, plan: Schedule, micro: Micro, arrange: Pack | None, watch: str | None, device: torch.device
) -> Batch:
    """One micro-batch, on the device; nothing is computed yet. `arrange` is None for a classifier."""
    chosen = {role: [plan.sequences[role][i] for i in rows] for role, rows in micro.rows.items()}
    index = {role: torch.tensor(rows, device=device) for role, rows in micro.rows.items()}
    if arrange is None:
        return Batch(
            {
                role: _of_examples(index[role], _Examples(network, chosen[role], watch, device), micro, role)
                for role in chosen
            }
        )
    packed = arrange([sequence for sequences in chosen.values() for sequence in sequences]).to(device)
    counts = {role: sum(len(sequence.targets) for sequence in sequences) for role, sequences in chosen.items()}
    forward = _Tokens(network, packed, watch, list(counts.values()))
    views, first, start = {}, 0, 0
    for place, (role, sequences) in enumerate(chosen.items()):
        end = start + counts[role]
        views[role] = View(
            index=index[role],
            targets=packed.targets[start:end],
            owner=packed.owner[start:end] - first,
            tokens_per_example=micro.tokens_per_example[role],
            even=micro.even[role],
            place=place,
            forward=forward,
        )
        first, start = first + len(sequences), end
    return Batch(views)


def _of_examples(index: Int[Tensor, " batch"], forward: _Examples, micro: Micro, role: str) -> View:
    return View(
        index=index,
        targets=torch.tensor([example.label for example in forward.examples], device=index.device),
        owner=torch.arange(len(index), device=index.device),
        tokens_per_example=micro.tokens_per_example[role],
        even=micro.even[role],
        place=0,
        forward=forward,
    )
