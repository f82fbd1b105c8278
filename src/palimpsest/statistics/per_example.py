"""The gradient of every example's own loss, for every weight, out of one backward pass a batch.

Examples do not meet in evaluation mode, so the gradient of the summed loss at a layer's output splits into those of the
examples. Together with the layer's input it gives each example's gradient of the layer's weights (see `gradients`). It
is handed on as soon as the backward pass has gone by, and then forgotten: memory does not grow with the examples.

Before the first batch the result is compared with plain gradients of single examples. An architecture for which it does
not hold is measured one example at a time instead of wrongly.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import (
    Examples,
    Minibatch,
    Reduction,
    TargetLoss,
    cross_entropy,
    evaluating,
    frozen,
    squared_logits,
)
from palimpsest.statistics.gradients import Dense, Gradient, Piece
from palimpsest.statistics.layers import reader, widened

Receive = Callable[[Minibatch, Gradient], None]
Choose = Callable[[str], bool]
Losses = Callable[[Minibatch], Float[Tensor, " batch"]]
Backward = Callable[[Minibatch, Losses], Float[Tensor, " batch"]]


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
        passes = _Passes(network, weights)
        obstacle = _obstacle(passes, examples)
        if obstacle:
            run.warn(f"{type(network).__name__}: {obstacle} Gradients are taken one record at a time, which is slower.")
        groups = examples.groups(1 if obstacle else batch_size)
        with (passes.alone if obstacle else passes.together)(receive) as backward:
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


class _Passes:
    """Forward and backward passes through one network, and whose weights are read off where."""

    def __init__(self, network: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        self.network, self.weights = network, weights
        names = {id(weight): name for name, weight in weights.items()}
        self.owned: dict[str, list[tuple[str, str]]] = {}
        self.modules: dict[str, nn.Module] = {}
        for key, module in network.named_modules():
            mine = [(n, names[id(w)]) for n, w in module.named_parameters(recurse=False) if id(w) in names]
            if mine:
                self.owned[key], self.modules[key] = mine, module
        self.readers = {key: reader(module) for key, module in self.modules.items()}

    @contextmanager
    def together(self, receive: Receive) -> Iterator[Backward]:
        """One forward and backward pass a batch; every weight is handed on as soon as its last use is known."""
        uses: dict[str, int] = defaultdict(int)
        pieces: dict[str, list[Piece]] = defaultdict(list)
        batch: Minibatch

        def entered(call: Call, output: Any) -> Any:
            for _, name in self.owned[call.key]:
                uses[name] += 1
            # what all examples share (positions, say) is handed out to each, or their gradients would come back as one
            if isinstance(output, Tensor) and output.shape[0] == 1 and len(batch) > 1:
                return output.expand(len(batch), *output.shape[1:])
            return None

        def finish(name: str) -> None:
            receive(batch, Gradient(name, self.weights[name].shape, len(batch), pieces.pop(name)))

        def returned(call: Call) -> None:
            made = self.readers[call.key](call, len(batch))
            for own, name in self.owned[call.key]:
                pieces[name].append(made[own])
                uses[name] -= 1
                if not uses[name]:
                    finish(name)

        def backward(given: Minibatch, of: Losses) -> Float[Tensor, " batch"]:
            nonlocal batch
            batch = given
            uses.clear()
            losses = _finite(of(batch), batch)
            losses.sum().backward()
            for name in list(pieces):
                finish(name)
            return losses.detach()

        with frozen(self.network), watch(self.modules, forward=entered, backward=returned):
            yield backward

    @contextmanager
    def alone(self, receive: Receive) -> Iterator[Backward]:
        """The same for batches of one, by plain automatic differentiation."""

        def backward(batch: Minibatch, of: Losses) -> Float[Tensor, " batch"]:
            losses = _finite(of(batch), batch)
            found = torch.autograd.grad(losses.sum(), list(self.weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(self.weights.items(), found, strict=True):
                if gradient is not None:
                    receive(batch, Gradient(name, weight.shape, 1, [Dense(widened(gradient)[None])]))
            return losses.detach()

        yield backward


def _finite(losses: Float[Tensor, " batch"], batch: Minibatch) -> Float[Tensor, " batch"]:
    bad = (~torch.isfinite(losses)).nonzero()[:, 0].tolist()
    if bad:
        raise PalimpsestError(f"the loss of record {int(batch.index[bad[0]]) + 1} is {float(losses[bad[0]].detach())}.")
    return losses


def _obstacle(passes: _Passes, examples: Examples) -> str:
    """Why gradients cannot be told apart by example here; empty where they can.

    The norms of up to three examples in one batch are compared with those of each alone. The loss is the squared
    logits, whose gradients do not vanish however well the model has learned.
    """
    network: Any = passes.network
    weights = passes.weights
    known = hashlib.sha256("|".join(weights).encode()).hexdigest()
    if getattr(network, "_palimpsest_per_example", ("", ""))[0] == known:
        return network._palimpsest_per_example[1]
    places = [place for (place,) in examples.groups(1)]
    group = list(dict.fromkeys((places[0], places[len(places) // 2], places[-1])))
    found: dict[str, Tensor] = {}
    expected = torch.zeros(len(group), len(weights))

    def of(batch: Minibatch) -> Float[Tensor, " batch"]:
        return batch.losses(network, "mean", squared_logits)

    def note(batch: Minibatch, gradient: Gradient) -> None:
        found[gradient.name] = gradient.squared_norms().clamp_min(0).sqrt().float().cpu()

    for row, place in enumerate(group):  # first, so that errors of the input itself are raised as such

        def expect(batch: Minibatch, gradient: Gradient, row: int = row) -> None:
            expected[row, list(weights).index(gradient.name)] = float(gradient.squared_norms().sqrt())

        with passes.alone(expect) as backward:
            backward(examples.batch([place]), of)
    try:
        with passes.together(note) as backward:
            backward(examples.batch(group), of)
    except (PalimpsestError, RuntimeError) as error:
        obstacle = str(error).strip().splitlines()[0].rstrip(".") + "."
    else:
        obstacle = _difference(weights, found, expected)
    if obstacle or len(group) > 1:  # a single record cannot show that records meet
        network._palimpsest_per_example = (known, obstacle)
    return obstacle


def _difference(
    weights: Mapping[str, nn.Parameter], found: Mapping[str, Tensor], expected: Float[Tensor, "examples weights"]
) -> str:
    floor = 1e-2 * expected.norm(dim=1)
    for column, (name, weight) in enumerate(weights.items()):
        norms, right = found.get(name, torch.zeros(len(expected))), expected[:, column]
        # loosely: bfloat16 rounds, and what is wrong here is wrong by far
        slack = 1e-1 if weight.dtype == torch.bfloat16 else 1e-2
        wrong = int(((norms - right).abs() > slack * torch.maximum(right, floor)).sum())
        if wrong >= min(2, len(expected)):  # once may be a router that rounding has tipped over
            return f"the gradient of {name} in a batch is not that of single records."
    return ""


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
