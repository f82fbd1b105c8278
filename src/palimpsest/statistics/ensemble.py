"""Very many small models at once: the data collection of an estimator that asks what models trained otherwise give.

A datamodel is fitted to the outputs of a thousand models, each trained on half of the data, and KLoM compares hundreds;
one at a time, small networks spend their day in the overhead of each step. Here the weights of M networks lie in one
tensor each, [M, ...], and a step of all of them is one batched product. This is a measuring instrument and no second
way to train a model that is handed on: for that there is `palimpsest.train`, whose weights it gives to rounding, batch
by batch (the same order from the same seed, AdamW, warm-up, schedule, and clipping of each model's own gradient).

    theta_m   [M, *weight]   weights of network m, all of one architecture
    rows_m    [M, batch]     which of the points network m learns from; equally many for all
    w         [batch]        weight of each of them, for a loss of opposite signs or one that takes turns

    L_m = mean over rows_m of w l(f(x; theta_m), target)

Examples that are left out are not computed with a weight of zero but not at all, so that batch normalisation never sees
them. Dropout draws differ from those of `palimpsest.train`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from transformers import Trainer, get_scheduler

from palimpsest.data.labelled import class_count, collate, labelled
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.training.settings import Training

RowLoss = Callable[[Float[Tensor, "batch classes"], Tensor], Float[Tensor, " batch"]]
"""The loss of each row from its logits and its target."""
TOGETHER = 100
"""Networks whose outputs are computed at once: memory, not result."""


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Networks of one architecture; the leading dimension of every tensor is the network."""

    network: Any
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, models: Sequence[Model]) -> Ensemble:
        """The models stacked; raises where they are no image classifiers of one architecture."""
        if not models:
            raise PalimpsestError("an ensemble needs at least one model.")
        for model in models:
            class_count(model)
            takes = getattr(model.network, "main_input_name", "")
            if takes != "pixel_values":
                raise PalimpsestError(f"{type(model.network).__name__} takes {takes}; only image classifiers stack.")
            shapes = [{name: x.shape for name, x in m.network.state_dict().items()} for m in (model, models[0])]
            if shapes[0] != shapes[1]:
                raise PalimpsestError("the models of an ensemble have different weights: expected one architecture.")
        parameters, buffers = stack_module_state([model.network for model in models])
        return cls(copy.deepcopy(models[0].network), {k: w.detach() for k, w in parameters.items()}, buffers)

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def __getitem__(self, chosen: slice) -> Ensemble:
        """Some of the networks."""
        parts = ({k: x[chosen] for k, x in tensors.items()} for tensors in (self.parameters, self.buffers))
        return Ensemble(self.network, *parts)

    def model(self, number: int) -> Model:
        """One of the networks as a model of its own, in evaluation mode."""
        network = copy.deepcopy(self.network).eval()
        network.load_state_dict({k: x[number] for k, x in {**self.parameters, **self.buffers}.items()})
        return Model(network)

    @torch.no_grad()
    def logits(self, records: Sequence[Record]) -> Float[Tensor, "models points classes"]:
        """The logits of every network for every record, in evaluation mode."""
        inputs, _ = _batch(self, records)
        self.network.eval()
        parts = (self[i : i + TOGETHER] for i in range(0, len(self), TOGETHER))
        return torch.cat([vmap(_forward(self.network), (0, 0, None))(p.parameters, p.buffers, inputs) for p in parts])


def train_together(
    start: Ensemble,
    records: Sequence[Record],
    rows: Int[Tensor, "models batch"],
    training: Training,
    run: Run,
    *,
    seeds: Sequence[int] | None = None,
    targets: Float[Tensor, "models points classes"] | None = None,
    loss: RowLoss | None = None,
    weights: Float[Tensor, "*steps batch"] | None = None,
    mode: Literal["train", "eval"] = "train",
    label: str = "training together",
) -> Ensemble:
    """Every network trained on its rows of the records: to their labels, or with `loss` to the rows of `targets`.

    `seeds` give the order of the mini-batches, as a run of that seed would draw it. `weights` belong to the columns of
    `rows`, the same for all steps or a row for each. `mode` is that of `palimpsest.train`. Raises where a loss stops
    being a number.
    """
    count = _check(start, records, rows, training)
    inputs, labels = _batch(start, records)
    given = labels.expand(len(start), -1) if targets is None else targets
    measure: RowLoss = loss or (lambda logits, target: F.cross_entropy(logits, target, reduction="none"))
    parameters = {name: w.clone().requires_grad_(True) for name, w in start.parameters.items()}
    buffers = {name: x.clone() for name, x in start.buffers.items()}
    network = start.network.train(mode == "train")
    forward = vmap(_forward(network), (0, 0, 0), randomness="different")
    optimizer, schedule, steps = _optimizer(network, parameters, training, count)
    weights = torch.ones(count) if weights is None else weights
    if weights.shape not in ((count,), (steps, count)):
        raise PalimpsestError(f"weights have shape {list(weights.shape)}, expected [{count}] or [{steps}, {count}].")
    models = torch.arange(len(start))[:, None]
    with run.seeded(), run.bar(label, steps) as advance:
        order = _order(len(start), count, training, steps, seeds or range(len(start)))
        for weight, places in zip(weights.expand(steps, count), order, strict=True):
            chosen = rows.gather(1, places)
            logits = forward(parameters, buffers, {name: x[chosen] for name, x in inputs.items()})
            of_row = vmap(measure)(logits, given[models, chosen])
            losses = (of_row * weight[places]).mean(1)
            if not torch.isfinite(losses).all():
                bad = int((~torch.isfinite(losses)).nonzero()[0])
                raise PalimpsestError(f"the loss of network {bad} is {float(losses[bad].detach())}. Lower the rate.")
            optimizer.zero_grad()
            losses.sum().backward()
            _clip(parameters, training.max_grad_norm)
            optimizer.step()
            schedule.step()
            advance(1)
    network.eval()
    return Ensemble(network, {name: w.detach() for name, w in parameters.items()}, buffers)


def subsets(models: int, points: int, size: int, generator: torch.Generator) -> Bool[Tensor, "models points"]:
    """Random masks, each with exactly `size` of the points."""
    if not 0 < size < points:
        raise PalimpsestError(f"a subset has {size} of {points} points, expected 1 to {points - 1}.")
    order = torch.rand(models, points, generator=generator).argsort(1)
    return order < size


def groups_like(
    forget: Int[Tensor, " forget"], labels: Int[Tensor, " train"], models: int, generator: torch.Generator
) -> Bool[Tensor, "models train"]:
    """Masks that each leave out a group of the size of the forget set, its labels shifted to others at random.

    Where a label has too few records outside the forget set, others take their places: the groups are equally large.
    """
    free, classes = torch.ones(len(labels), dtype=torch.bool), int(labels.max()) + 1
    free[forget] = False
    if len(forget) > int(free.sum()):
        raise PalimpsestError(
            f"no group of {len(forget)} records is left beside the forget set: it is half of the data."
        )
    masks = torch.ones(models, len(labels), dtype=torch.bool)
    for mask in masks:
        shift = int(torch.randint(1, max(2, classes), (), generator=generator))
        wanted = torch.bincount((labels[forget] + shift) % classes, minlength=classes)
        order = torch.randperm(len(labels), generator=generator)
        order = order[free[order]]
        own = F.one_hot(labels[order], classes)
        fits = (own.cumsum(0).gather(1, labels[order][:, None])[:, 0] <= wanted[labels[order]]).int()
        mask[order[fits.argsort(descending=True, stable=True)[: len(forget)]]] = False
    return masks


def places(masks: Bool[Tensor, "models points"]) -> Int[Tensor, "models size"]:
    """The points that each mask includes; raises where they are not equally many."""
    sizes = masks.sum(1).unique().tolist()
    if len(sizes) != 1 or not sizes[0]:
        raise PalimpsestError(f"the masks include {min(sizes)} to {max(sizes)} points, expected equally many and some.")
    return masks.nonzero()[:, 1].view(len(masks), -1)


def _forward(network: Any) -> Callable[..., Tensor]:
    def forward(parameters: Any, buffers: Any, inputs: Any) -> Tensor:
        return functional_call(network, (parameters, buffers), kwargs=inputs).logits

    return forward


def _batch(ensemble: Ensemble, records: Sequence[Record]) -> tuple[dict[str, Tensor], Tensor]:
    return collate(labelled(Model(ensemble.network), records), next(iter(ensemble.parameters.values())).device)


def _check(start: Ensemble, records: Sequence[Record], rows: Tensor, training: Training) -> int:
    """How many rows every network has."""
    if rows.ndim != 2 or len(rows) != len(start) or not rows.shape[1]:
        raise PalimpsestError(f"rows have shape {list(rows.shape)}, expected [{len(start)}, batch]: a row a network.")
    if int(rows.min()) < 0 or int(rows.max()) >= len(records):
        raise PalimpsestError(f"rows name a record outside 0 to {len(records) - 1}.")
    if training.lora_rank:
        raise PalimpsestError("lora_rank is set, but networks that are trained together train all weights.")
    return rows.shape[1]


def _optimizer(network: Any, parameters: Mapping[str, Tensor], training: Training, count: int) -> tuple[Any, Any, int]:
    """AdamW with the groups of the trainer, its schedule, and the number of steps."""
    names: Any = Trainer.get_decay_parameter_names
    decayed = set(names(None, network))
    groups = [
        {"params": [w for name, w in parameters.items() if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, training.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate)
    per_epoch = math.ceil(count / training.batch_size)
    steps = min(training.epochs * per_epoch, training.max_steps or math.inf)
    name = {"constant": "constant_with_warmup"}.get(training.decay, training.decay)
    warmup = min(round(training.warmup_epochs * per_epoch), int(steps))
    return optimizer, get_scheduler(name, optimizer, warmup, int(steps)), int(steps)


def _order(
    models: int, count: int, training: Training, steps: int, seeds: Sequence[int]
) -> Iterator[Int[Tensor, "models batch"]]:
    """The columns of `rows` that go into each step, as `palimpsest.training.schedule` draws them."""
    if len(seeds) != models:
        raise PalimpsestError(f"there are {len(seeds)} seeds for {models} networks.")
    draws = [np.random.default_rng([seed, count]) for seed in seeds]
    per_epoch = math.ceil(count / training.batch_size)
    every = torch.arange(count).expand(models, -1)
    for step in range(steps):
        if per_epoch == 1:
            yield every  # the order within a step does not matter
            continue
        if step % per_epoch == 0:
            cuts = np.array_split(np.stack([draw.permutation(count) for draw in draws]), per_epoch, axis=1)
        yield torch.from_numpy(cuts[step % per_epoch])


def _clip(parameters: Mapping[str, Tensor], most: float) -> None:
    """Scales the gradient of every network whose norm is above `most`."""
    gradients = [w.grad for w in parameters.values() if w.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (most / (norm + 1e-6)).clamp_max(1)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))
