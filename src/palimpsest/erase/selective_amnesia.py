"""Selective amnesia: find where facts are recalled, then unlearn there and nowhere else.

Causal tracing shows at which layers the subject of a sentence is turned into what is known about it; in transformers
these are the MLPs of the first layers. Gradient difference then trains those MLPs alone, and the weight that holds the
retain set grows exponentially as soon as the retain loss rises above its level in the first epoch. Use it for facts
about named subjects, where the rest of the network should stay bit-identical.

Source: Agrawal and Huang 2025 (SemEval-2025, arXiv 2504.12996) and the authors' code. Unrelated to the paper of the
same name on diffusion models. Differs: a batch is compared with its own items in the first epoch, where the code takes
the mean over all batches (divided by examples, which makes it too small): batches are cut by length here, and short
answers have other losses than long ones however little is forgotten. The ascent ends at the loss of a uniform guess,
which the code does not bound; the last weights are kept, not those with the lowest joint loss on validation data, which
rewards forgetting without end. As in the code, alpha belongs to what is computed at once: with gradient accumulation
every part of a step has its own.

    L_f, L_r   []   token-weighted cross-entropy of the forget and the retain items of a batch, nats; 0 where none
    Lbar       []   L_r of the same items in the first epoch
    Delta           L_r - Lbar
    alpha           clip(a b^Delta + c, alpha_min, alpha_max); alpha_min in the first epoch and where Delta <= 0

    L = -L_f + alpha L_r        alpha is no part of the gradient
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.tracing import SUBJECT, Fact, NothingToTraceError, UntraceableError, fact_of, third, trace
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train
from palimpsest.training.views import View


def adaptive_weight(
    delta: float,
    base: float = 6.0,
    scale: float = 0.3,
    shift: float = 0.8,
    least: float = 1.2,
    most: float = 2.8,
    decimals: int | None = None,
) -> float:
    """alpha(Delta); the code rounds the value before it is clipped to one decimal."""
    if delta <= 0:
        return least
    value = scale * base**delta + shift
    value = value if decimals is None else round(value, decimals)
    return min(max(value, least), most)


@system(
    "selective-amnesia",
    verb="erase",
    title="Selective amnesia (constrained unlearning)",
    paper="Agrawal and Huang 2025 (arXiv 2504.12996)",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="adapted",
    deviations=(
        "the retain loss is compared with that of the same items in the first epoch, not with the mean of all batches",
        "the forget loss is capped at that of a uniform guess",
        "the last weights are kept, not those with the lowest joint loss",
        "the layers are traced on the forget records by default, the paper fixes 0 to 5",
    ),
)
class SelectiveAmnesia(Method):
    """Gradient difference on the MLPs where the facts are recalled, with a retain weight that adapts."""

    layers: Literal["auto", "all"] | tuple[int, ...] = setting(
        default="auto", origin="ours; paper: 0 to 5 of 16 and of 32", help="layers to train; auto: chosen by tracing"
    )
    module: Literal["mlp", "attention", "both"] = setting(default="mlp", origin="paper", help="what is trained there")
    traced: int = setting(default=10, at_least=1, origin="ours", help="most forget facts that are traced")
    adaptive: bool = setting(default=True, origin="paper", help="whether the retain weight adapts, else it is `least`")
    scale: float = setting(default=0.3, at_least=0, origin="paper", help="a")
    base: float = setting(default=6.0, above=0, origin="paper", help="b")
    shift: float = setting(default=0.8, origin="paper", help="c")
    least: float = setting(default=1.2, at_least=0, origin="paper", help="alpha_min")
    most: float = setting(default=2.8, at_least=0, origin="paper; the code: 2.3", help="alpha_max")
    decimals: int | None = setting(
        default=None, at_least=0, origin="ours; the code: 1", help="decimals that alpha is rounded to before clipping"
    )
    cap: float | None = setting(
        default=None, above=0, origin="ours", help="forget loss beyond which nothing is gained; None: log vocabulary"
    )
    training: Training = setting(
        default=Training(learning_rate=1.5e-5, epochs=8, batch_size=120, weight_decay=0.0, warmup_epochs=0.0),
        origin="official code: 12 x 10 records a step",
        help="how to train",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the constrained unlearning."""
        if self.least > self.most:
            raise PalimpsestError(f"least is {self.least:g}, more than most ({self.most:g}).")
        chosen = self._parameters(model, data, run)
        plan = schedule(model, self.training, run, pooled=True, forget=data.forget, retain=data.retain)
        cap = self.cap or math.log(model.network.config.get_text_config().vocab_size)
        memory: dict[str, Any] = {"step": 0, "first": {}, "curve": []}
        weight = _Weight(self, memory, plan.steps_per_epoch)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            loss = torch.zeros((), device=model.device)
            if "forget" in batch:
                loss = loss - batch.forget.mean_tokens((-batch.forget.log_probs).clamp_max(cap))
            if "retain" in batch:
                loss = loss + weight.of(batch.retain) * batch.retain.cross_entropy
            return loss

        def after_step(step: int, student: Model) -> bool:
            memory["step"] = step
            return False

        result = train(
            model,
            plan,
            objective,
            self.training,
            run,
            trainable=chosen.__contains__,
            stop=after_step,
            memory=memory,
        )
        run.note(retain_weight=memory["curve"])
        return result

    def _parameters(self, model: Model, data: Roles, run: Run) -> set[str]:
        """The names of what is trained."""
        layers: tuple[int, ...] | None = None
        if self.layers == "auto":
            layers = self._traced(model, data.forget, run)
        elif self.layers != "all":
            layers = tuple(self.layers)
            if not layers:
                raise PalimpsestError("layers is empty: no layer was named to train.")
        roles = ["mlp", "attention"] if self.module == "both" else [self.module]
        match = anatomy(model.network).select(roles, layers)
        run.note(layers=sorted({part.layer for part in match.parts if part.layer is not None}))
        return set(match.tensors())

    def _traced(self, model: Model, records: list[Record], run: Run) -> tuple[int, ...]:
        """The layers where the facts are recalled; the first third, as in the paper, where the model knows none.

        Records that do not name their subject before the answer are passed over; raises where all are such.
        """
        facts = self._facts(model, records)
        try:
            found = trace(model, facts, run, places=SUBJECT)
        except NothingToTraceError as error:
            layers = tuple(range(third(len(anatomy(model.network).blocks()))))
            run.warn(f"selective-amnesia: {error} The first third of the layers is trained.")
            return layers
        run.note(effects=found.effects.nan_to_num(), total_effect=found.total_effect, untraceable=found.skipped)
        return found.layers()

    def _facts(self, model: Model, records: list[Record]) -> list[Fact]:
        """The first facts that can be traced; where there are none, what is wrong with the first record is raised."""
        facts: list[Fact] = []
        problem = None
        for record in records:
            try:
                facts.append(fact_of(model, record))
            except UntraceableError as error:
                problem = problem or error
            if len(facts) == self.traced:
                break
        if not facts and problem is not None:
            raise problem
        return facts


class _Weight:
    """alpha of one micro-batch after the other, from its retain loss and that of the same items in the first epoch.

    `memory` holds the steps that are done, the loss of each item in the first epoch, and alpha so far.
    """

    def __init__(self, method: SelectiveAmnesia, memory: dict[str, Any], first_epoch: int) -> None:
        self.method, self.memory, self.first_epoch = method, memory, first_epoch

    def of(self, retain: View) -> float:
        m, nll, first = self.method, retain.nll.detach(), self.memory["first"]
        items = [str(item) for item in retain.index.tolist()]
        alpha = m.least
        if self.memory["step"] < self.first_epoch:
            first.update(zip(items, nll.tolist(), strict=True))
        elif m.adaptive:
            delta = (float(nll.sum()) - sum(first[item] for item in items)) / float(retain.count.sum())
            alpha = adaptive_weight(delta, m.base, m.scale, m.shift, m.least, m.most, m.decimals)
        self.memory["curve"].append(alpha)
        return alpha
