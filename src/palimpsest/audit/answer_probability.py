"""Answer probability: how likely the model finds the true answer, as a geometric mean over its tokens.

The most direct trace of memorisation, and blind to other wordings: a model can know a fact and give this sentence a low
probability. Where a record has wrong options and no paraphrase (multiple choice), the answer competes with them.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2.2.

    A       mean_nll   negative log-likelihood a token, nats
    P       exp(-A)
    P_mc    P_right / (P_right + sum_j P_wrong_j + 1e-10)
"""

from __future__ import annotations

import math

import numpy as np

from palimpsest.audit.answers import ROLES, alternatives, answers
from palimpsest.audit.reading import Better, Reading, mean_value
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, system


def probabilities(model: Model, records: list[Record], run: Run) -> np.ndarray:
    """P of each record's answer, or its share among the options where the record is multiple choice."""
    chosen = np.array([bool(record.wrong and record.prompt) and record.paraphrase is None for record in records])
    found = np.empty(len(records))
    if chosen.any():
        right, wrong = alternatives(model, [records[i] for i in np.flatnonzero(chosen)], run)
        found[chosen] = [share(r.mean_nll, [w.mean_nll for w in ws]) for r, ws in zip(right, wrong, strict=True)]
    if not chosen.all():
        told = answers(model, [records[i] for i in np.flatnonzero(~chosen)], run)
        found[~chosen] = np.exp([-answer.mean_nll for answer in told])
    return found


def share(right: float, wrong: list[float]) -> float:
    """The right option's probability among all, from the negative log-likelihoods a token."""
    p = math.exp(-right)
    return p / (p + sum(math.exp(-nll) for nll in wrong) + 1e-10)


@system(
    "answer-probability",
    verb="audit",
    title="Answer probability",
    paper="Maini et al. 2024 (arXiv 2401.06121)",
    uses={"forget", "retain", "real", "world"},
    fidelity="matches the official code",
)
class AnswerProbability(Probe):
    """The mean probability of the true answers of every role."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`probability/<role>` with its bootstrap interval over examples."""
        values, arrays = [], {}
        for role in ROLES:
            if records := data.probe(role):
                p = probabilities(model, records, run)
                better: Better = "lower" if role == "forget" else "higher"
                values.append(mean_value(f"probability/{role}", p, better=better, seed=run.seed))
                arrays[f"probability/{role}"] = p.tolist()
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays)
