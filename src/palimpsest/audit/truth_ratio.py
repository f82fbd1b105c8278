"""Truth ratio: are wrong answers as likely to the model as the right one in other words?

Looks past the wording that was trained on. A model that knows the fact prefers the right answer even paraphrased
(R far below 1); one that never knew it does not.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2.2 and its code, which takes the arithmetic mean of the
wrong probabilities on the utility sets (`mean="arithmetic"`); the geometric mean is the paper's.

    P_right  exp(-A(paraphrased answer))
    P_wrong  exp(-mean_j A(wrong answer j))
    R        P_wrong / P_right
    forget set: mean min(R, 1/R), 1 is best;    other sets: mean max(0, 1 - R), 1 is best
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from palimpsest.audit.answers import ROLES, alternatives, with_wrong
from palimpsest.audit.reading import Reading, mean_value
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, setting, system

Mean = Literal["geometric", "arithmetic"]


def truth_ratio(right: float, wrong: list[float], mean: Mean = "geometric") -> float:
    """R from negative log-likelihoods a token of the right and the wrong answers."""
    if mean == "geometric":
        return math.exp(min(right - sum(wrong) / len(wrong), 700.0))
    return sum(math.exp(-nll) for nll in wrong) / len(wrong) / max(math.exp(-right), 1e-300)


def aggregate(ratios: np.ndarray, role: str) -> np.ndarray:
    """The per-example score whose mean is reported: 1 is best on every set."""
    if role == "forget":
        return np.minimum(ratios, 1 / np.maximum(ratios, 1e-300))
    return np.maximum(0, 1 - ratios)


def ratios(model: Model, records: list[Record], run: Run, mean: Mean = "geometric") -> np.ndarray:
    """R of each record."""
    right, wrong = alternatives(model, records, run)
    return np.array(
        [truth_ratio(r.mean_nll, [w.mean_nll for w in ws], mean) for r, ws in zip(right, wrong, strict=True)]
    )


@system(
    "truth-ratio",
    verb="audit",
    title="Truth ratio",
    paper="Maini et al. 2024 (arXiv 2401.06121)",
    uses={"forget", "retain", "real", "world"},
    fidelity="matches the official code",
)
class TruthRatio(Probe):
    """The truth ratio of every role whose records have wrong answers."""

    mean: Mean = setting(
        default="geometric", origin="paper; its utility code: arithmetic", help="mean over the wrong answers"
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`truth_ratio/<role>`, and R of each example as the array of that name."""
        values, arrays = [], {}
        for role in ROLES:
            if records := with_wrong(data.probe(role)):
                r = ratios(model, records, run, self.mean)
                values.append(mean_value(f"truth_ratio/{role}", aggregate(r, role), better="higher", seed=run.seed))
                arrays[f"truth_ratio/{role}"] = r.tolist()
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays)
