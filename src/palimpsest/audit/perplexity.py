"""Perplexity on neutral text: does the model still write as it did?

PPL = exp(sum of token NLL / number of tokens), over the texts of the role `general`
"""

from __future__ import annotations

import numpy as np

from palimpsest.audit.answers import answers
from palimpsest.audit.reading import Reading, bootstrap_value
from palimpsest.data.records import Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, system


def _perplexity(rows: np.ndarray, axis: int) -> np.ndarray:
    """exp of total NLL over total tokens; rows hold (nll, tokens) of each text."""
    total = rows.sum(axis=axis)
    return np.exp(total[..., 0] / total[..., 1])


@system(
    "perplexity",
    verb="audit",
    title="General perplexity",
    paper="",
    needs={"general"},
    fidelity="standard practice",
)
class Perplexity(Probe):
    """The perplexity on the neutral texts of the role `general`."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`perplexity/general` with its bootstrap interval over texts."""
        scores = answers(model, data.general, run)
        rows = np.array([[-a.log_prob.sum(), len(a.log_prob)] for a in scores])
        value = bootstrap_value("perplexity/general", rows, _perplexity, better="lower", seed=run.seed)
        return Reading(probe=self.facts.slug, values=(value,), arrays={"nll": (rows[:, 0] / rows[:, 1]).tolist()})
