"""The relearning attack: fine-tune on a few forget records and see how fast the knowledge comes back.

Suppressed knowledge returns in a few steps; knowledge that is gone is learned as slowly as by a model that never had
it. The erased model and gold are fine-tuned identically on a part of the forget set and measured on the rest of it, so
that what counts is what comes back by itself, not what is taught again. A model that knows clearly more before the
attack than gold ever does in it has not forgotten: it has nothing to relearn, and no robustness is given.

Source: OpenUnlearning (Dorna et al. 2025, arXiv 2506.12618), robustness as defined there; the card's definition was
recalled, the symbols are ours.

    m_before, m_after   mean answer probability on the untaught forget records
    robustness          min(1, (m_after - m_before)_gold / (m_after - m_before)_model); 1: no faster than gold
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from palimpsest.audit.answer_probability import probabilities
from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.data.records import Record, Roles, digest
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, setting, system
from palimpsest.train import Training, schedule, train

MARGIN = 0.1
"""How much more than gold ever does a model must know before the attack to count as not having forgotten."""


def robustness(gain_gold: float, gain: float) -> float:
    """min(1, gold's gain over the model's); 1 where the model gains nothing."""
    return 1.0 if gain <= max(gain_gold, 1e-9) else max(0.0, gain_gold) / gain


@system(
    "relearning",
    verb="audit",
    title="Relearning attack",
    paper="Dorna et al. 2025 (arXiv 2506.12618)",
    needs={"forget"},
    fidelity="adapted",
    deviations=("measured on forget records that the attack does not train on",),
)
class Relearning(Probe):
    """How fast the untaught forget records return when a part of the forget set is learned again."""

    share: float = setting(
        default=0.2, above=0, below=1, origin="card: 10-20 %", help="share of the forget set that is taught"
    )
    points: int = setting(default=4, at_least=1, origin="ours", help="how often the curve is measured")
    training: Training = setting(
        default=Training(learning_rate=5e-5, epochs=8, batch_size=4, warmup_epochs=0.0, decay="constant"),
        origin="ours",
        help="how the attacker trains",
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`robustness`, and the curve as arrays `steps` and `probability` (and `probability_gold`)."""
        if gold is None:
            raise PalimpsestError(
                "the relearning attack compares with a model that never saw the forget set; pass gold."
            )
        forget = data.require("forget", by=self.facts.slug)
        taught = max(1, round(self.share * len(forget)))
        if taught >= len(forget):
            raise PalimpsestError(f"the relearning attack needs at least 2 forget records (found {len(forget)}).")
        chosen = np.random.default_rng(run.seed).permutation(len(forget))
        teach, rest = [forget[i] for i in chosen[:taught]], [forget[i] for i in sorted(chosen[taught:])]
        steps, own = self._curve(model, teach, rest, run)
        _, of_gold = self._curve(gold, teach, rest, run) if gold is not model else (steps, own)

        relearned = mean_value("relearned/forget", own[-1], better="gold", seed=run.seed)
        arrays = {
            "steps": steps,
            "probability": own.mean(1).tolist(),
            "probability_gold": of_gold.mean(1).tolist(),
        }
        if own[0].mean() > of_gold.mean(1).max() + MARGIN:
            known = "the model knows the forget records better than gold does after the attack: nothing to relearn"
            return Reading(probe=self.facts.slug, values=(relearned,), arrays=arrays, caveats=(known,))
        gains = np.stack([own[-1] - own[0], of_gold[-1] - of_gold[0]])
        rows = np.random.default_rng(run.seed).integers(0, len(rest), size=(1000, len(rest)))
        resampled = [robustness(theirs, mine) for mine, theirs in gains[:, rows].mean(-1).T.tolist()]
        low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
        r = robustness(float(gains[1].mean()), float(gains[0].mean()))
        return Reading(
            probe=self.facts.slug,
            values=(
                Value(name="robustness", value=r, n=len(rest), low=low, high=high, better="higher"),
                relearned,
            ),
            arrays=arrays,
        )

    def _curve(
        self, model: Model, teach: list[Record], rest: list[Record], run: Run
    ) -> tuple[list[int], Float[np.ndarray, "points records"]]:
        """Steps, and the probability of every untaught record at each of them."""
        key = ("relearning", model.digest(), self, run.seed, digest(teach), digest(rest))
        known = run.cache.setdefault(key, {})
        if not known:
            plan = schedule(model, self.training, run, teach=teach)
            total = len(plan.steps)
            due = sorted({round(total * (i + 1) / self.points) for i in range(self.points)} - {0})
            steps, curve = [0], [probabilities(model, rest, run)]

            def look(step: int, student: Model) -> bool:
                if step in due:
                    steps.append(step)
                    curve.append(probabilities(student, rest, Run(seed=run.seed, progress=False)))
                    student.network.train()
                return False

            apart = run.replace(in_place=False, folder=None, stop=None)
            train(
                model,
                plan,
                lambda batch: batch.teach.cross_entropy,
                self.training,
                apart,
                stop=look,
                label="relearning",
            )
            known.update(steps=steps, curve=np.stack(curve))
        return known["steps"], known["curve"]
