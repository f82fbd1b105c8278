"""Membership inference: can an attacker tell the forget records from records that were never trained on?

Six attacks, each a score per record (high: looks like a non-member) and its AUC over forget against holdout:
1 = the forget records still look trained on, 0.5 = no better than chance, below 0.5 = over-forgotten. Blind where
forget and holdout differ in more than membership: the gold model's AUC shows that, and is the value to come close to.

Sources: loss, Yeom et al. 2018 (arXiv 1709.01604); zlib, Carlini et al. 2021 (arXiv 2012.07805); Min-K%, Shi et al.
2024 (arXiv 2310.16789); Min-K%++, Zhang et al. 2024 (arXiv 2404.02936); reference, Mireshghallah et al. 2022
(arXiv 2203.03929); gradient norm as in OpenUnlearning (the model stays in eval mode here).

    loss            A
    zlib            A / bytes of the zlib-compressed answer text
    min-k           -mean of the lowest max(1, floor(k L)) token log-probabilities
    min-k++         the same on (log p - mu) / sigma,  mu and sigma over the vocabulary
    gradient-norm   mean over weight tensors of the L2 norm of the gradient of A
    reference       A - A under the gold model
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from palimpsest.audit.answers import Answer, answers
from palimpsest.audit.reading import Reading, Value
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics import per_example as statistics
from palimpsest.system import Probe, setting, system


def min_k(scores: np.ndarray, k: float) -> float:
    """-mean of the lowest max(1, floor(k L)) scores."""
    if not 0 < k <= 1:
        raise PalimpsestError(f"k is {k:g}, expected a share above 0 and at most 1.")
    lowest = max(1, int(k * len(scores)))
    return -float(np.sort(scores)[:lowest].mean())


def min_k_plus(answer: Answer, k: float) -> float:
    """Min-K%++ of one sequence."""
    return min_k((answer.log_prob - answer.mean) / answer.deviation, k)


def zlib_ratio(answer: Answer, text: str) -> float:
    """A over the compressed size of the text in bytes."""
    return answer.mean_nll / len(zlib.compress(text.encode()))


def auc(members: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    """P(score of an other > score of a member), ties counted half."""
    m, o = np.asarray(members)[:, None], np.asarray(others)[None, :]
    return float((o > m).mean() + 0.5 * (o == m).mean())


def auc_value(name: str, members: np.ndarray, others: np.ndarray, seed: int) -> Value:
    """The AUC with a 95 % bootstrap interval that resamples both groups."""
    point = auc(members, others)
    wins = (others[None, :] > members[:, None]) + 0.5 * (others[None, :] == members[:, None])
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(members), (1000, len(members)))
    columns = rng.integers(0, len(others), (1000, len(others)))
    resampled = [wins[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    n = min(len(members), len(others))
    return Value(name=name, value=point, n=n, low=float(low), high=float(high), better="gold")


def gradient_norms(model: Model, records: list[Record], run: Run) -> np.ndarray:
    """Mean over weight tensors of the L2 norm of the gradient of A, in eval mode; weights A ignores do not count."""
    return statistics.gradient_norms(model, records, run, reduction="mean").values.mean(1).numpy()


def _told(record: Record) -> str:
    """The text whose tokens are scored: an answer, a text, or the last turn of a chat."""
    return record.answer or record.text or (record.messages[-1]["content"] if record.messages else "")


@system(
    "membership",
    verb="audit",
    title="Membership inference (six attacks)",
    paper="Shi et al. 2024 (arXiv 2310.16789) and others",
    needs={"forget", "holdout"},
    fidelity="adapted",
    deviations=("the gradient norm is taken in eval mode",),
)
class Membership(Probe):
    """The AUC of six attacks that tell the forget records from never-seen ones."""

    k: float = setting(
        default=0.4, above=0, at_most=1, origin="MUSE, OpenUnlearning", help="share of tokens for Min-K% and Min-K%++"
    )
    gradients: bool = setting(
        default=True, origin="OpenUnlearning", help="also the gradient norm: one backward pass a record"
    )
    most: int = setting(default=200, at_least=5, origin="ours", help="records of each group for the gradient norm")

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`auc/<attack>` with bootstrap intervals, and the scores of both groups."""
        groups = {
            "forget": data.require("forget", by=self.facts.slug),
            "holdout": data.require("holdout", by=self.facts.slug),
        }
        scores: dict[str, dict[str, np.ndarray]] = {}
        for name, records in groups.items():
            own = answers(model, records, run)
            texts = [_told(record) for record in records]
            scored = {
                "loss": [a.mean_nll for a in own],
                "zlib": [zlib_ratio(a, text) for a, text in zip(own, texts, strict=True)],
                "min-k": [min_k(a.log_prob, self.k) for a in own],
                "min-k++": [min_k_plus(a, self.k) for a in own],
            }
            if gold is not None and gold is not model:
                before = answers(gold, records, run)
                scored["reference"] = [a.mean_nll - b.mean_nll for a, b in zip(own, before, strict=True)]
            for attack, x in scored.items():
                scores.setdefault(attack, {})[name] = np.array(x)
            if self.gradients:
                scores.setdefault("gradient-norm", {})[name] = gradient_norms(model, records[: self.most], run)
        values = [auc_value(f"auc/{attack}", g["forget"], g["holdout"], run.seed) for attack, g in scores.items()]
        arrays = {f"{attack}/{group}": x.tolist() for attack, g in scores.items() for group, x in g.items()}
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays)


@system(
    "privleak",
    verb="audit",
    title="PrivLeak",
    paper="Shi et al. 2024 (arXiv 2407.06460)",
    needs={"forget", "holdout"},
    fidelity="matches the official code",
)
class PrivLeak(Probe):
    """Min-K% membership relative to gold, per cent: -100 still memorised, 0 good, above 0 over-forgotten."""

    k: float = setting(default=0.4, above=0, at_most=1, origin="MUSE", help="share of tokens")

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`privleak` = 100 (a - a_ref) / a_ref with a = 1 - AUC of Min-K%; a_ref is 0.5 where there is no gold."""
        forget = [min_k(a.log_prob, self.k) for a in answers(model, data.require("forget"), run)]
        holdout = [min_k(a.log_prob, self.k) for a in answers(model, data.require("holdout"), run)]
        reference = 0.5
        if gold is not None:
            members = [min_k(a.log_prob, self.k) for a in answers(gold, data["forget"], run)]
            others = [min_k(a.log_prob, self.k) for a in answers(gold, data["holdout"], run)]
            reference = 1 - auc(members, others)
        f, h = np.array(forget), np.array(holdout)

        area = auc_value("a", f, h, run.seed)
        assert area.low is not None
        assert area.high is not None
        value = Value(
            name="privleak",
            value=privleak(1 - area.value, reference),
            n=area.n,
            low=privleak(1 - area.high, reference),
            high=privleak(1 - area.low, reference),
            unit="%",
            better="gold",
        )
        caveats = () if gold is not None else ("PrivLeak takes 0.5 as the gold AUC, since no gold model was given",)
        return Reading(probe=self.facts.slug, values=(value,), caveats=caveats)


def privleak(area: float, reference: float) -> float:
    """100 (a - a_ref) / a_ref, per cent; `a` is P(holdout scores higher log-probability than forget)."""
    if reference <= 0:
        raise PalimpsestError(
            "PrivLeak divides by the gold AUC, which is 0 here: gold and holdout are fully separated."
        )
    return 100 * (area - reference) / reference
