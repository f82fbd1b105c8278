"""How a statistics pass is fed: records as batches whose rows are examples, and the loss of each example.

Every row of a batch is one record, padded on the right, so that what streams out of the network can be told apart by
record. Records of similar length go together, and a batch holds no more positions than memory is meant for; nothing
that is computed per example depends on how the batches were cut.

    z_t    logits    [targets, classes]  predictions of the targets: answer tokens, or the one label of an image or text
    y_t    targets   [targets]           the true token or label
    l_t    cross-entropy of y_t under z_t, nats; label-free: |z_t|^2

    loss of an example = sum of l_t over its targets (`sum`), or their mean (`mean`)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.packing import Packed, pad
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.model import Model

POSITIONS = 1024
"""Positions of a batch of sequences: long enough for full speed; the logits at them are what takes the memory."""

Reduction = Literal["sum", "mean"]
TargetLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(
    logits: Float[Tensor, "targets classes"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each target, nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def squared_logits(
    logits: Float[Tensor, "targets classes"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Squared L2 norm of the logits at each target, whatever the target is."""
    return logits.square().sum(-1)


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """Some examples as inputs of a network, a row each. `index` says which of the given records they are.

    `lengths` counts the positions that are not padding; it is None where an example is not a sequence. `owner` says
    which row a target belongs to.
    """

    index: Int[Tensor, " batch"]
    inputs: Mapping[str, Tensor]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    lengths: Int[Tensor, " batch"] | None = None
    packed: Packed | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def width(self) -> int | None:
        """Positions of a row, padding included; None where an example is not a sequence."""
        return None if self.lengths is None else next(iter(self.inputs.values())).shape[1]

    @property
    def real(self) -> Bool[Tensor, "batch width"] | None:
        """Which positions are not padding."""
        if self.lengths is None or self.width is None:
            return None
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[:, None]

    @property
    def count(self) -> Float[Tensor, " batch"]:
        """Targets of each example."""
        return torch.bincount(self.owner, minlength=len(self)).to(torch.float32)

    def logits(self, network: Any) -> Float[Tensor, "targets classes"]:
        """One forward pass; the float32 (or wider) logits that predict each target."""
        if self.packed is not None:
            return self.packed.target_logits(network)
        logits = network(**self.inputs).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def visit(self, network: Any) -> None:
        """One forward pass without logits where the network can leave them out, for what hooks collect."""
        if self.packed is not None:
            network(**self.packed.inputs(), logits_to_keep=torch.zeros(1, dtype=torch.long))
        else:
            network(**self.inputs)

    def losses(
        self,
        network: Any,
        reduction: Reduction = "sum",
        loss: TargetLoss = cross_entropy,
        draw: Callable[[Tensor, Minibatch], Tensor] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The loss of each example; `draw(logits, self)`, where given, puts other targets into the place of its own."""
        logits = self.logits(network)
        if int(self.targets.max()) >= logits.shape[-1] or int(self.targets.min()) < 0:
            raise PalimpsestError(
                f"label {int(self.targets.max() if self.targets.min() >= 0 else self.targets.min())} is outside the "
                f"{logits.shape[-1]} classes of {type(network).__name__}."
            )
        values = loss(logits, self.targets if draw is None else draw(logits.detach(), self))
        sums = values.new_zeros(len(self)).index_add(0, self.owner, values)
        return sums / self.count.to(sums) if reduction == "mean" else sums


class Examples:
    """Records as a model takes them: token sequences with scored tokens for a language model, else inputs and label."""

    def __init__(
        self,
        model: Model,
        records: Sequence[Any],
        max_length: int | None = None,
        role: str = "data",
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if not len(records):
            raise PalimpsestError(f"the {role} set is empty.")
        self.classifier = kind_of(model) == "classifier"
        self.device = model.device
        self.items: list[Any] = list(records)
        if isinstance(records[0], Record):
            if self.classifier:
                from palimpsest.data.labelled import labelled

                self.items = list(labelled(model, records, max_length, warn))
            else:
                self.items = Encoder.of(model, max_length).records(records, warn)

    def __len__(self) -> int:
        return len(self.items)

    def groups(
        self,
        size: int = 32,
        *,
        order: Literal["length", "given"] = "length",
        among: Sequence[int] | None = None,
        positions: int = POSITIONS,
    ) -> list[list[int]]:
        """Which examples go into which batch: at most `size`, and of sequences about `positions` with padding.

        With the order `given` every batch but the last has exactly `size` examples, in the order of the records.
        `among` names the examples that are meant; without it all are.
        """
        if size < 1:
            raise PalimpsestError(f"batch_size is {size}, expected at least 1.")
        wanted = list(range(len(self)) if among is None else among)
        if order == "given":
            return [wanted[i : i + size] for i in range(0, len(wanted), size)]
        lengths = {i: self._length(self.items[i]) for i in wanted}
        found: list[list[int]] = []
        for i in sorted(wanted, key=lengths.__getitem__):
            full = not found or len(found[-1]) == size
            # sorted, so the newest is the longest and says how wide the row would be
            if full or (lengths[i][0] > 1 and (len(found[-1]) + 1) * lengths[i][0] > positions):
                found.append([])
            found[-1].append(i)
        return found

    def batch(self, group: Sequence[int]) -> Minibatch:
        """The examples at these places as one batch."""
        index = torch.tensor(list(group))
        chosen = [self.items[i] for i in group]
        if isinstance(chosen[0], Encoded):
            packed = pad(chosen).to(self.device)
            return Minibatch(
                index=index,
                inputs={"input_ids": packed.tokens},
                targets=packed.targets,
                owner=packed.owner,
                lengths=torch.tensor([len(item.tokens) for item in chosen], device=self.device),
                packed=packed,
            )
        from palimpsest.data.labelled import collate

        inputs, labels = collate(chosen, self.device)
        mask = inputs.get("attention_mask")
        owner = torch.arange(len(chosen), device=self.device)
        return Minibatch(index, inputs, labels, owner, lengths=None if mask is None else mask.sum(-1))

    def _length(self, item: Any) -> tuple[int, int]:
        if isinstance(item, Encoded):
            return len(item.tokens), item.start
        return item.size, 0


@contextlib.contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Evaluation mode inside, the mode of every module as it was afterwards."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def frozen(network: Any) -> Iterator[None]:
    """No weight takes part in gradients inside; afterwards those do that did before."""
    training = [weight for weight in network.parameters() if weight.requires_grad]
    for weight in training:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in training:
            weight.requires_grad_(True)
