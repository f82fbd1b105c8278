"""The gradient of every example's own loss, for every weight, out of one backward pass a batch.

Examples do not meet in evaluation mode, so the gradient of the summed loss at a layer's output splits into those of the
examples. Together with the layer's input it gives each example's gradient of the layer's weights (see `gradients`). It
is handed on as soon as the backward pass has gone by, and then forgotten: memory does not grow with the examples.

Before the first batch the result is compared with plain gradients of single examples. An architecture for which it does
not hold is measured one example at a time instead of wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import (
    Examples,
    Minibatch,
    Reduction,
    TargetLoss,
    cross_entropy,
    evaluating,
)
from palimpsest.statistics.gradients import Gradient
from palimpsest.statistics.passes import Passes, Receive, obstacle

Choose = Callable[[str], bool]


def stream_gradients(
    model: Model,
    examples: Examples,
    run: Run,
    receive: Receive,
    *,
    reduction: Reduction = "sum",
    loss: TargetLoss = cross_entropy,
    only: Choose | None = None,
    batch_size: int = 32,
    label: str = "gradients",
) -> Float[Tensor, " examples"]:
    """Hands the gradients of every trainable weight, batch after batch, to `receive`; returns the losses.

    `only` chooses weights by name. The network is in evaluation mode meanwhile, and its weights get no `.grad`. A
    weight that the loss does not depend on is not handed on. Where the network has a part whose gradients cannot be
    told apart by example, records are taken one at a time, and `run.warn` says so.
    """
    network = model.network
    weights = trainable(network, only)
    losses = torch.empty(len(examples))

    def of(batch: Minibatch) -> Float[Tensor, " batch"]:
        return batch.losses(network, reduction, loss)

    with evaluating(network), torch.enable_grad():
        passes = Passes(network, weights)
        why = obstacle(passes, examples)
        if why:
            run.warn(f"{type(network).__name__}: {why} Gradients are taken one record at a time, which is slower.")
        groups = examples.groups(1 if why else batch_size)
        with (passes.alone if why else passes.together)(receive) as backward:
            for group in run.track(groups, label):
                batch = examples.batch(group)
                losses[batch.index] = backward(batch, of).to(losses)
    return losses


def trainable(network: nn.Module, only: Choose | None = None) -> dict[str, nn.Parameter]:
    """The weights that train, by name, tied ones once; raises where none is chosen or one is in half precision."""
    found = {name: w for name, w in network.named_parameters() if w.requires_grad and (only is None or only(name))}
    if not found:
        raise PalimpsestError(f"no weight of {type(network).__name__} is left: none trains, or the names match none.")
    for name, weight in found.items():
        if weight.dtype == torch.float16:
            raise PalimpsestError(
                f"{name} is in float16, in which the gradients of a trained model vanish. Load the model in float32."
            )
    return found


# --- what is made of them ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the gradients, a row an example and a column a weight; weights that the loss ignores are left out."""

    names: tuple[str, ...]
    values: Float[Tensor, "examples weights"]
    losses: Float[Tensor, " examples"]

    def whole(self) -> Float[Tensor, " examples"]:
        """The norm over all weights together."""
        return self.values.norm(dim=1)


def gradient_norms(
    model: Model,
    records: Sequence[Any],
    run: Run,
    *,
    reduction: Reduction = "sum",
    loss: TargetLoss = cross_entropy,
    only: Choose | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> GradientNorms:
    """The norm of the gradient of each record's loss, for every weight, without forming the gradients."""
    examples = Examples(model, records, max_length, warn=run.warn)
    names = list(trainable(model.network, only))
    values = torch.zeros(len(examples), len(names), dtype=torch.float64)
    seen = torch.zeros(len(names), dtype=torch.bool)

    def receive(batch: Minibatch, gradient: Gradient) -> None:
        column = names.index(gradient.name)
        values[batch.index, column] = gradient.squared_norms().clamp_min(0).sqrt().to(values)
        seen[column] = True

    losses = stream_gradients(
        model,
        examples,
        run,
        receive,
        reduction=reduction,
        loss=loss,
        only=only,
        batch_size=batch_size,
        label="gradient norms",
    )
    kept = seen.nonzero()[:, 0]
    return GradientNorms(tuple(names[i] for i in kept), values[:, kept], losses)


def mean_gradient(
    model: Model,
    records: Sequence[Any],
    run: Run,
    *,
    reduction: Reduction = "mean",
    loss: TargetLoss = cross_entropy,
    only: Choose | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> dict[str, Float[Tensor, "*weight"]]:
    """The gradient of the mean loss over all records, in evaluation mode, summed in float32 or wider.

    It does not depend on how the records are cut into batches. Weights that the loss ignores have zeros.
    """
    examples = Examples(model, records, max_length, warn=run.warn)
    network, weights = model.network, trainable(model.network, only)
    total = {name: wide_zeros(weight) for name, weight in weights.items()}
    with evaluating(network), torch.enable_grad():
        for group in run.track(examples.groups(batch_size), "gradient"):
            for name, g in batch_gradient(network, weights, examples.batch(group), reduction, loss).items():
                total[name].add_(g, alpha=1 / len(examples))
    return total


def batch_gradient(
    network: Any, weights: Mapping[str, nn.Parameter], batch: Minibatch, reduction: Reduction, loss: TargetLoss
) -> dict[str, Tensor]:
    """The gradient of the batch's summed loss, for the weights that it depends on."""
    summed = batch.losses(network, reduction, loss).sum()
    found = torch.autograd.grad(summed, list(weights.values()), allow_unused=True)
    return {name: g for name, g in zip(weights, found, strict=True) if g is not None}


def wide_zeros(weight: Tensor) -> Tensor:
    """Zeros of the weight's shape in float32, or in float64 where the weight is."""
    return torch.zeros_like(weight, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
