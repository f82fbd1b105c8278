"""The same, stated effort for every method: a grid of learning rates on validation data that no table uses.

closeness   1 - |P - P_gold| / (P_before - P_gold), at least 0: how near the forget answers are to gold's probability
kept        min(1, utility / utility before)
score       harmonic mean of the two; the learning rate with the best score is taken
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.audit.battery import TOFU_BATTERY, probes
from palimpsest.comparison import Task, compare
from palimpsest.report.evidence import ModelEvidence
from palimpsest.run import Run
from palimpsest.tasks import VALIDATION_SEED, tuned


def score(model: ModelEvidence, before: ModelEvidence, gold: ModelEvidence) -> float:
    """How well a method erased and kept, between 0 and 1."""
    p, start, aim = (_value(m, "probability/forget") for m in (model, before, gold))
    closeness = max(0.0, 1 - abs(p - aim) / max(start - aim, 1e-9))
    kept = min(1.0, _value(model, "model_utility") / _value(before, "model_utility"))
    return 2 * closeness * kept / (closeness + kept) if closeness + kept > 0 else 0.0


def tune(
    task: Task,
    names: Sequence[str],
    table: Mapping[str, Mapping[str, Any]],
    learning_rates: Sequence[float],
    folder: Path,
    run: Run,
) -> dict[str, dict[float, float]]:
    """The score of every method at every learning rate, on the validation seed of the task."""
    quick = dataclasses.replace(task, probes=tuple(probes(TOFU_BATTERY, max_new_tokens=task.max_new_tokens)))
    scores: dict[str, dict[float, float]] = {name: {} for name in names}
    for rate in learning_rates:
        methods = tuned(names, table, {"training.learning_rate": rate})
        found = compare(quick, methods, folder, seeds=[VALIDATION_SEED], run=run, keep_models=True)
        before, gold, *erased = found.models
        for model in erased:
            scores[model.name][rate] = score(model, before, gold)
    return scores


def _value(model: ModelEvidence, name: str) -> float:
    return next(v.value for reading in model.readings for v in reading.values if v.name == name)
