"""The diagonal Fisher information: how much each weight matters to some records, in one streamed pass.

    per_sample    I_i = mean over records r of (d L_r / d theta_i)^2
    batch         I_i = mean over batches b of (d mean_{r in b} L_r / d theta_i)^2, every batch of the same weight
    label_free    I_i = mean over batches b of |d mean_{r in b} |z_r|^2 / d theta_i|, z the logits

`per_sample` is the definition (with the true labels: the empirical Fisher); it depends neither on the order nor on the
batches. `batch` and `label_free` are what published code computes; they do depend on both. L_r is the summed (or mean)
negative log-likelihood of a record's answer, or the cross-entropy of its label.

Sources: Kirkpatrick et al. 2017 (arXiv 1612.00796); the modes, Foster et al. 2024 (arXiv 2308.07707, 2402.19308).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.finite import is_finite
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import POSITIONS, Examples, Reduction, cross_entropy, evaluating, squared_logits
from palimpsest.statistics.per_example import (
    Choose,
    Gradient,
    Minibatch,
    batch_gradient,
    stream_gradients,
    trainable,
    wide_zeros,
)
from palimpsest.statistics.stored import read_tensors, write_tensors

Mode = Literal["per_sample", "batch", "label_free"]
FORMAT = "palimpsest-fisher-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fisher:
    """The importance of every weight, by its name in `named_parameters`; frozen and unused weights have zeros.

    `model` is the digest of the weights that it was measured on; `batch_size` is 0 where it has no influence.
    """

    values: Mapping[str, Float[Tensor, "*weight"]]
    model: str
    examples: int
    mode: Mode
    reduction: Reduction
    batch_size: int = 0

    @property
    def zeros(self) -> int:
        """How many weights have an importance of exactly zero."""
        return sum(value.numel() - int(torch.count_nonzero(value)) for value in self.values.values())

    def digest(self) -> str:
        """SHA-256 over the importances and what they were measured on."""
        sha = hashlib.sha256(repr(sorted(self._facts().items())).encode())
        for name in sorted(self.values):
            sha.update(name.encode())
            sha.update(self.values[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def check(self, model: Model) -> None:
        """Raises where these are the importances of another model, or no importances."""
        if self.model != model.digest():
            raise PalimpsestError(
                f"the importances belong to a model with weights {self.model[:12]}..., this one has "
                f"{model.digest()[:12]}... Measure them again on this model."
            )
        check_importances(self.values, model.network)

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file, complete or not at all."""
        return write_tensors(path, self.values, {"format": FORMAT, **self._facts()})

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> Fisher:
        """The importances of a file, after `check` where a model is given; raises where the file holds none."""
        values, facts = read_tensors(path, FORMAT, "importance", "cpu" if model is None else model.device)
        found = cls(
            values=values,
            model=facts["model"],
            examples=int(facts["examples"]),
            mode=facts["mode"],  # type: ignore[arg-type]
            reduction=facts["reduction"],  # type: ignore[arg-type]
            batch_size=int(facts["batch_size"]),
        )
        if model is not None:
            found.check(model)
        return found

    def _facts(self) -> dict[str, str]:
        names = ("model", "examples", "mode", "reduction", "batch_size")
        return {name: str(getattr(self, name)) for name in names}


def check_importances(values: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raises where names or shapes are not those of the network, or a value is no importance."""
    weights = dict(network.named_parameters())
    for names, other, what in ((weights, values, "is missing"), (values, weights, "is unknown to the model")):
        lost = [name for name in names if name not in other]
        if lost:
            raise PalimpsestError(f"importances: {lost[0]} {what} ({len(lost)} such names). Measure them again.")
    for name, value in values.items():
        if value.shape != weights[name].shape:
            raise PalimpsestError(
                f"importances: {name} has shape {list(value.shape)}, expected {list(weights[name].shape)}."
            )
        if value.dtype not in (torch.float32, torch.float64):
            raise PalimpsestError(
                f"importances: {name} is {str(value.dtype).removeprefix('torch.')}, expected float32 or float64: "
                "squared gradients vanish in anything smaller."
            )
        if not is_finite(value):
            raise PalimpsestError(f"importances: {name} has values that are not finite.")
        if (value < 0).any():
            raise PalimpsestError(f"importances: {name} has values below 0.")


def diagonal_fisher(
    model: Model,
    records: Sequence[Any],
    run: Run,
    mode: Mode = "per_sample",
    *,
    reduction: Reduction = "sum",
    batch_size: int = 32,
    only: Choose | None = None,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    role: str = "data",
) -> Fisher:
    """The importance of every weight to the records, in evaluation mode.

    `batch_size` matters to the result except `per_sample`, where it is how many are computed at once. Sums are in
    float32, or in float64 where the weights are or `dtype` says so. `only` chooses weights by name; others have zeros.
    """
    if mode not in get_args(Mode):
        raise PalimpsestError(f"mode is {mode!r}. {nearest(str(mode), get_args(Mode))}")
    if dtype not in (None, torch.float32, torch.float64):
        raise PalimpsestError(f"dtype is {dtype}, expected torch.float32 or torch.float64.")
    digest = model.digest()
    examples = Examples(model, records, max_length, role, run.warn)
    values = {name: wide_zeros(weight) for name, weight in model.network.named_parameters()}
    values = {name: value.to(dtype or value.dtype) for name, value in values.items()}
    label = f"importance, {role}"
    if mode == "per_sample":

        def receive(batch: Minibatch, gradient: Gradient) -> None:
            gradient.add_squares(values[gradient.name])

        stream_gradients(
            model, examples, run, receive, reduction=reduction, only=only, batch_size=batch_size, label=label
        )
        count, batch_size = len(examples), 0
    else:
        count = _by_batch(model, examples, run, mode, reduction, batch_size, only, values, label)
    for value in values.values():
        value.div_(count)
    return Fisher(
        values=values, model=digest, examples=len(examples), mode=mode, reduction=reduction, batch_size=batch_size
    )


def _by_batch(
    model: Model,
    examples: Examples,
    run: Run,
    mode: Mode,
    reduction: Reduction,
    batch_size: int,
    only: Choose | None,
    values: Mapping[str, Tensor],
    label: str,
) -> int:
    """Adds up the squared (or absolute) gradients of the batches; returns how many batches there were."""
    network, weights = model.network, trainable(model.network, only)
    loss = squared_logits if mode == "label_free" else cross_entropy
    groups = examples.groups(batch_size, order="given")
    with evaluating(network), torch.enable_grad():
        for group in run.track(groups, label):
            total: dict[str, Tensor] = {}
            for part in examples.groups(batch_size, among=group, positions=POSITIONS):
                for name, g in batch_gradient(network, weights, examples.batch(part), reduction, loss).items():
                    total[name] = total.get(name, 0) + g.to(values[name].dtype)
            for name, g in total.items():
                g = g / len(group)
                values[name].add_(g.abs() if mode == "label_free" else g.square())
    return len(groups)
