"""FLAT: loss adjustment with only the forget data.

Every forget question comes with two answers: the one to forget and a template, a polite refusal. FLAT raises an
f-divergence between the two in its variational form, with the mean token probability of an answer as the critic. The
conjugate gives each answer a weight of its own that stays bounded, so the loss cannot run away; no retain data and no
reference model are needed. Use it where there is nothing but the data to delete. A template that is all but impossible
under the model is learned slowly or not at all (the slope of a probability p is p (1 - p)); that is the method.

Source: Wang et al. 2025 (ICLR; arXiv 2410.11143) and the authors' code. Differs: answers are averaged over their own
tokens, as in the paper; the code divides by the padded length (`normalise="padded"`). The divergence is taken of each
example, as in the paper; the code averages the critic over the batch first (`reduce="batch_first"`). Of the code's
eight divergences reverse KL, squared Hellinger and Neyman have the wrong sign with a positive critic and are refused.

    v_e, v_f   critic  [batch]  mean probability of the tokens of template and forget answer, in (0, 1)
    g          activation       of the divergence's optimal critic
    c          conjugate        f*(g(v))

    L = mean [ -g(v_e) + c(v_f) ]

    kl       g = v              c = exp(v - 1)
    tv       g = tanh(v) / 2    c = tanh(v) / 2
    js       g = log 2 - softplus(-v)    c = v + softplus(-v) - log 2
    pearson  g = v              c = v^2 / 4 + v
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.data.refusals import REFUSALS
from palimpsest.erase.preference import other_answers
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Schedule, Training, View, schedule, train

Divergence = Literal["kl", "tv", "js", "pearson"]
Term = Callable[[Tensor], Tensor]

DIVERGENCES: dict[str, tuple[Term, Term]] = {
    "kl": (lambda v: v, lambda v: torch.exp(v - 1)),
    "tv": (lambda v: torch.tanh(v) / 2, lambda v: torch.tanh(v) / 2),
    "js": (lambda v: math.log(2) - F.softplus(-v), lambda v: v + F.softplus(-v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v.square() / 4 + v),
}
WRONG_SIGN = ("reverse-kl", "squared-hellinger", "neyman")
BARELY = 0.01
"""A template whose mean token probability rose by less than this was not learned."""


def flat_loss(
    template: Float[Tensor, " batch"],
    forget: Float[Tensor, " batch"],
    divergence: Divergence = "kl",
    reduce: Literal["example", "batch_first"] = "example",
) -> Float[Tensor, ""]:
    """L from the critic values of template and forget answers; raises on a divergence of the wrong sign."""
    if divergence not in DIVERGENCES:
        why = "would raise the forget answer or lower the template" if divergence in WRONG_SIGN else "is not known"
        raise PalimpsestError(f"divergence is {divergence!r}, which {why}. Choose {', '.join(DIVERGENCES)}.")
    activation, conjugate = DIVERGENCES[divergence]
    if reduce == "batch_first":
        template, forget = template.mean(), forget.mean()
    return (conjugate(forget) - activation(template)).mean()


def weights(template: float, forget: float, divergence: Divergence) -> tuple[float, float]:
    """How strongly template and forget answer pull: -dL/dv_e and dL/dv_f."""
    v_e, v_f = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (template, forget))
    template_slope, forget_slope = torch.autograd.grad(flat_loss(v_e, v_f, divergence), (v_e, v_f))
    return -float(template_slope), float(forget_slope)


def critic(view: View, padded: int | None = None) -> Float[Tensor, " batch"]:
    """v: mean probability of each sequence's targets; over `padded` - 1 positions where that is given."""
    total = view.sum_tokens(view.log_probs.exp())
    return total / (padded - 1 if padded is not None else view.count)


@system(
    "flat",
    verb="erase",
    title="Loss adjustment with only forget data (FLAT)",
    paper="Wang et al. 2025 (arXiv 2410.11143)",
    takes="causal-lm",
    needs={"forget"},
    fidelity="matches the official code",
    deviations=(
        "answers are averaged over their own tokens, the code divides by the padded length",
        "the divergence is taken of each example, the code averages the critic over the batch first",
        "refusals as templates for every data set; the code's loader for books feeds retain text",
    ),
)
class FLAT(Method):
    """Trades the forget answers for template answers by a bounded f-divergence; sees forget data only."""

    divergence: Divergence = setting(default="tv", origin="official code", help="the f-divergence that is raised")
    templates: tuple[str, ...] = setting(
        default=(), origin="official code: 100 refusals", help="answers to give instead; none given: refusals"
    )
    normalise: Literal["answer", "padded"] = setting(
        default="answer", origin="paper; the code: padded", help="what a sum of token probabilities is divided by"
    )
    reduce: Literal["example", "batch_first"] = setting(
        default="example",
        origin="paper; the code: batch_first",
        help="whether the mean is outside or inside of g and c",
    )
    enough: float | None = setting(
        default=None, above=0, origin="ours", help="stop once the mean token probability of a step is below this"
    )
    training: Training = setting(
        default=Training(epochs=5, batch_size=64), origin="official code: 16 x 4 records a step", help="how to train"
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the adjustment."""
        templates = list(self.templates or REFUSALS)
        check_templates(data.forget, templates)
        template = other_answers(model, data.forget, templates, self.training)
        plan = schedule(model, self.training, run, forget=data.forget, template=template)
        if self.reduce == "batch_first":
            check_whole(plan)
        padded = Encoder.of(model, self.training.max_length).max_length if self.normalise == "padded" else None
        curve = _Curve()

        def objective(batch: Batch) -> Float[Tensor, ""]:
            v_e, v_f = critic(batch.template, padded), critic(batch.forget, padded)
            curve.add(v_e.detach(), v_f.detach())
            return flat_loss(v_e, v_f, self.divergence, self.reduce)

        def after_step(step: int, student: Model) -> bool:
            curve.end_step()
            return self.enough is not None and curve.memory["forget"][-1] < self.enough

        result = train(model, plan, objective, self.training, run, stop=after_step, memory=curve.memory)
        curve.report(run, self.divergence)
        return result


class _Curve:
    """The critic values of every step, gathered from its micro-batches."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.memory: dict[str, list[float]] = {"template": [], "forget": []}

    def add(self, template: Float[Tensor, " batch"], forget: Float[Tensor, " batch"]) -> None:
        self.parts.append((template, forget))

    def end_step(self) -> None:
        template, forget = (torch.cat(values) for values in zip(*self.parts, strict=True))
        self.memory["template"].append(float(template.mean()))
        self.memory["forget"].append(float(forget.mean()))
        self.parts = []

    def report(self, run: Run, divergence: Divergence) -> None:
        template, forget = self.memory["template"], self.memory["forget"]
        pulls = [weights(e, f, divergence) for e, f in zip(template, forget, strict=True)]
        run.note(template_probability=template, forget_probability=forget)
        run.note(template_weight=[e for e, _ in pulls], forget_weight=[f for _, f in pulls])
        if template and template[-1] - template[0] < BARELY:
            run.warn(
                f"flat: the mean token probability of the template answers went from {template[0]:.3f} to "
                f"{template[-1]:.3f}; the model did not learn to give them."
            )


def check_templates(records: list[Record], templates: list[str]) -> None:
    """Raises where a template is empty or is the answer to forget: their divergence is zero."""
    if any(not template.strip() for template in templates):
        raise PalimpsestError("templates holds an empty answer.")
    for record in records:
        if record.answer is not None and record.answer.strip() in {template.strip() for template in templates}:
            raise PalimpsestError(f'flat: a template is the very answer to forget of "{record.title}".')


def check_whole(plan: Schedule) -> None:
    """Raises where a step is cut: the mean inside of g and c is over the whole batch."""
    most = max(map(len, plan.steps))
    if most > 1:
        raise PalimpsestError(
            f"reduce=batch_first needs a step in one piece, but its records are computed in {most} parts. "
            "Raise training.micro_tokens or lower training.batch_size."
        )
