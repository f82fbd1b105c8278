"""Extraction strength and exact memorisation: how much of an answer the model completes word for word.

Extraction strength asks how short a beginning suffices to make the model recite the rest; exact memorisation, what
share of the tokens it predicts right with all before them given. One teacher-forced pass gives both: where every
prediction from position k on is right under teacher forcing, greedy decoding from k recites the same tokens.

Source: Carlini et al. 2021 (arXiv 2012.07805), Tirumala et al. 2022 (arXiv 2205.10770), in OpenUnlearning's form.
Differs: OpenUnlearning gives 1/L where no suffix is right; here that is 0. The end mark is left out.

    correct  [L]   whether the most likely token is the true one
    k              smallest index with correct[k:] all true (L where the last is wrong)
    ES = 1 - k / L,    EM = mean(correct)
"""

from __future__ import annotations

import numpy as np

from palimpsest.audit.answers import answers
from palimpsest.audit.reading import Better, Reading, mean_value
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, system


def extraction_strength(correct: np.ndarray) -> float:
    """1 - k / L of one sequence."""
    wrong = np.flatnonzero(~correct)
    k = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - k / len(correct)


def _correct(model: Model, records: list[Record], run: Run) -> list[np.ndarray]:
    return [answer.correct[answer.words] for answer in answers(model, records, run)]


def _reading(slug: str, name: str, model: Model, data: Roles, run: Run, per_example: object) -> Reading:
    values, arrays = [], {}
    for role in ("forget", "retain"):
        if records := data.probe(role):
            x = [float(per_example(c)) for c in _correct(model, records, run) if len(c)]  # type: ignore[operator]
            better: Better = "lower" if role == "forget" else "higher"
            values.append(mean_value(f"{name}/{role}", x, better=better, seed=run.seed))
            arrays[f"{name}/{role}"] = x
    return Reading(probe=slug, values=tuple(values), arrays=arrays)


@system(
    "extraction-strength",
    verb="audit",
    title="Extraction strength",
    paper="Carlini et al. 2021 (arXiv 2012.07805)",
    needs={"forget"},
    uses={"retain"},
    fidelity="adapted",
    deviations=("0, not 1/L, where no suffix is recited",),
)
class ExtractionStrength(Probe):
    """The share of an answer that the model recites once given the rest before it."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`extraction_strength/<role>` for forget and retain."""
        return _reading(self.facts.slug, "extraction_strength", model, data, run, extraction_strength)


@system(
    "exact-memorisation",
    verb="audit",
    title="Exact memorisation",
    paper="Tirumala et al. 2022 (arXiv 2205.10770)",
    needs={"forget"},
    uses={"retain"},
    fidelity="matches the official code",
)
class ExactMemorisation(Probe):
    """The share of answer tokens that the model predicts right under teacher forcing."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`exact_memorisation/<role>` for forget and retain."""
        return _reading(self.facts.slug, "exact_memorisation", model, data, run, np.mean)
