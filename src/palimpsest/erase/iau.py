"""Influence approximation unlearning (IAU): one step up on the forget set and down on the rest, and that is all.

Taking an example out is treated as adding its opposite, whose gradient is the negative; adding examples is what a
gradient step does. Use it as the cheapest eraser of all, for records that the model has learned by heart. It lowers
what is left but does not reach a retrained model, and the loss on the forget set has no bound: a larger rate or a
second step wrecks the model. With the gradient of the whole training set stored (`training_gradient` and its `save`,
the setting `cached_gradient`) a deletion needs the forget records alone. `iau-training` is how the model should have
learned.

Source: Liu et al. 2025 (arXiv 2507.23257), by its official code; of the paper only the abstract and summaries could be
read. Differs: gradients are taken in evaluation mode (the code leaves the training mode on, but its networks have
neither dropout nor batch normalisation); language models are ours.

    g_f   forget        [weights]  gradient of the mean loss over the forget set
    g_r   retain        [weights]  the same over the retain set
    g_D   total         [weights]  the same over both, n = n_f + n_r records
    eta   learning_rate
    c     correction               weight of the retain set; 0 is one step of gradient ascent

    g      = c g_r - g_f                 g_r = (n g_D - n_f g_f) / n_r
    theta <- theta - eta g                    (sgd)
             theta - eta g / (|g| + 1e-8)     (adam1: the first step of a fresh Adam)
             theta - eta sign(g)              (sign)

Where training has converged on both sets together, n g_D = 0, so g_r points along -g_f: with c = 1, g is
-(1 + n_f / n_r) g_f. The correction then only rescales the ascent, and under the sign-like rules it does nothing. The
ledger's `alignment`, the cosine of g and -g_f, says how far the model is from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Reduction
from palimpsest.statistics.per_example import mean_gradient
from palimpsest.statistics.training_gradient import TrainingGradient, check_finite, mark
from palimpsest.system import Method, setting, system

Rule = Literal["adam1", "sgd", "sign"]
Gradients = Mapping[str, Tensor]
EPSILON = 1e-8
"""What Adam adds to the denominator."""


def change(gradient: Float[Tensor, "*weight"], rule: Rule, learning_rate: float) -> Float[Tensor, "*weight"]:
    """What is added to the weights."""
    if rule == "sgd":
        return -learning_rate * gradient
    if rule == "sign":
        return -learning_rate * gradient.sign()
    return -learning_rate * gradient / (gradient.abs() + EPSILON)


def retained_gradient(
    total: Float[Tensor, "*weight"], forget: Float[Tensor, "*weight"], examples: int, forgotten: int
) -> Float[Tensor, "*weight"]:
    """g_r out of g_D and g_f, exactly, without the retain set."""
    return (examples * total - forgotten * forget) / (examples - forgotten)


def cosine(first: Gradients, second: Gradients) -> float:
    """The cosine between two gradients over all weights; 0 where one of them vanishes."""
    product = sum(float((g.double() * second[name].double()).sum()) for name, g in first.items())
    norms = norm_of(first) * norm_of(second)
    return product / norms if norms else 0.0


def norm_of(gradients: Gradients) -> float:
    """The L2 norm over all weights."""
    return sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5


@torch.no_grad()
def step(network: nn.Module, gradients: Gradients, rule: Rule, learning_rate: float) -> float:
    """Moves the network's weights once, in place; returns the share of all weights whose value is another now."""
    if not learning_rate > 0:
        raise PalimpsestError(f"iau: learning_rate is {learning_rate}, expected above 0.")
    moved = size = 0
    for name, weight in network.named_parameters():
        size += weight.numel()
        if name in gradients:
            g = gradients[name]
            after = (weight.to(g.dtype) + change(g, rule, learning_rate)).to(weight.dtype)
            moved += int((after != weight).sum())
            weight.copy_(after)
    return moved / size


@system(
    "iau",
    verb="erase",
    title="Influence approximation unlearning (IAU)",
    paper="Liu et al. 2025 (arXiv 2507.23257)",
    takes="causal-lm or classifier",
    needs={"forget"},
    uses={"retain"},
    fidelity="matches the official code",
    deviations=(
        "gradients in evaluation mode; the official networks have neither dropout nor batch normalisation",
        "the stored gradient and the part of the retain set are ours; the first changes nothing",
        "language models are ours: a record's loss is the mean over its answer",
    ),
)
class IAU(Method):
    """Moves the weights once: up the loss on `forget`, down the loss on `retain`."""

    rule: Rule = setting(default="adam1", origin="official code; the theory: sgd", help="how g becomes a step")
    learning_rate: float = setting(default=1e-3, above=0, origin="official code", help="eta")
    correction: float = setting(
        default=1.0, at_least=0, origin="official code", help="weight of the retain set; 0: gradient ascent"
    )
    retain_fraction: float = setting(
        default=1.0, above=0, at_most=1, origin="ours", help="random part of the retain set that g_r is taken on"
    )
    cached_gradient: str | None = setting(
        default=None, origin="ours", help="file of the stored gradient of all training data; retain is then not used"
    )
    reduction: Reduction = setting(
        default="mean", origin="ours", help="loss of a language model's record: mean over its answer, or summed"
    )
    batch_size: int = setting(default=128, at_least=1, origin="ours: speed only", help="records computed at once")
    max_length: int | None = setting(
        default=512, at_least=2, origin="ours", help="longest sequence, tokens; None: the model's"
    )

    def __post_init__(self) -> None:
        if self.cached_gradient is not None and self.retain_fraction < 1:
            raise PalimpsestError("iau: a stored gradient is exact, so retain_fraction must be 1 with it.")
        if not self.correction and (self.cached_gradient is not None or self.retain_fraction < 1):
            raise PalimpsestError("iau: with correction 0 neither cached_gradient nor retain_fraction has an effect.")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the step; its ledger entry says how much the correction mattered."""
        total = self._stored(model, data.forget)
        kept = self._part(data, run) if total is None and self.correction else []
        forget = self._gradient(model, data.forget, run, "forget")
        retain = self._gradient(model, kept, run, "retain") if kept else {}
        if total is not None:
            sizes = (total.examples, len(data.forget))
            retain = {name: retained_gradient(g, forget[name], *sizes) for name, g in total.values.items()}
        towards = {name: -g for name, g in forget.items()}
        update = {name: g + self.correction * retain[name] for name, g in towards.items()} if retain else towards
        edited = model if run.in_place else model.copy()
        moved = step(edited.network, update, self.rule, self.learning_rate)
        run.note(
            alignment=cosine(update, towards),
            norms={"forget": norm_of(forget), "retain": norm_of(retain), "update": norm_of(update)},
            moved=moved,
            examples={"forget": len(data.forget), "retain": sizes[0] - sizes[1] if total is not None else len(kept)},
        )
        if not moved:
            run.warn("iau: no weight was changed: the gradients vanish, or the weights' precision is below the step.")
        return edited

    def _stored(self, model: Model, forget: Sequence[Record]) -> TrainingGradient | None:
        if self.cached_gradient is None:
            return None
        stored = TrainingGradient.load(self.cached_gradient, model)
        if model.processor is not None and stored.reduction != self.reduction:
            raise PalimpsestError(
                f"iau: the stored gradient has reduction {stored.reduction}, expected {self.reduction}."
            )
        known = set(stored.records)
        if strange := [record for record in forget if mark(record) not in known]:
            raise PalimpsestError(
                f"iau: {len(strange)} forget records are not among those of the stored gradient "
                f'(first: "{strange[0].title}"). Only what was trained on can be taken out of it.'
            )
        if stored.examples <= len(forget):
            raise PalimpsestError(f"iau: nothing is retained: all {stored.examples} records are to be forgotten.")
        return stored

    def _part(self, data: Roles, run: Run) -> list[Record]:
        if "retain" not in data:
            raise PalimpsestError(
                'iau needs the role "retain", or a stored gradient (cached_gradient), or correction 0.'
            )
        count = max(1, round(self.retain_fraction * len(data.retain)))
        chosen = torch.randperm(len(data.retain), generator=run.generator())[:count].sort().values
        return [data.retain[i] for i in chosen.tolist()]

    def _gradient(self, model: Model, records: Sequence[Record], run: Run, role: str) -> dict[str, Tensor]:
        found = mean_gradient(
            model, records, run, reduction=self.reduction, batch_size=self.batch_size, max_length=self.max_length
        )
        check_finite(found, role)
        return found
