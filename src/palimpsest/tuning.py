"""The same, stated effort for every method: a few values of its main setting on validation data that no table uses.

closeness   1 - |P - P_gold| / (P_before - P_gold), at least 0: how near the forget answers are to gold's probability
kept        min(1, utility / utility before)
score       harmonic mean of the two; the value with the best score is taken, where it matters which

No value is taken where all have one score: what does nothing at any value keeps its own setting.
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

Values = tuple[float, ...]
Grids = Mapping[str, tuple[str, Values]]

RATE = "training.learning_rate"
GRIDS: Grids = {
    "*": (RATE, (1e-4, 3e-4, 1e-3, 3e-3)),
    "ssd": ("alpha", (1.5, 2.0, 3.0, 5.0)),
    "iau": ("learning_rate", (1e-4, 3e-4, 1e-3, 3e-3)),
    "loss-curvature": ("rho", (0.8, 0.9, 0.95, 0.98)),
    "balanced-subnet": ("ratio", (0.0015, 0.005, 0.015, 0.05)),
    "uld": (RATE, (1e-3, 3e-3, 1e-2, 3e-2)),
    "whp": ("reinforce.learning_rate", (3e-4, 1e-3, 3e-3, 1e-2)),
    "whp-decode": ("reinforce.learning_rate", (3e-4, 1e-3, 3e-3, 1e-2)),
    "guard": ("decoding.threshold", (0.05, 0.2, 0.5, 0.8)),
}
"""The setting that decides how hard a method acts, and what is tried on the harness; `*`: every other method."""
EMBEDDED_GRIDS: Grids = {
    "*": (RATE, (3e-5, 1e-4)),
    "ssd": ("alpha", (2.2, 2.4)),
    "iau": ("learning_rate", (1e-5, 1e-4)),
    "loss-curvature": ("rho", (0.8, 0.9)),
    "balanced-subnet": ("ratio", (0.015, 0.05)),
    "uld": (RATE, (1e-3, 3e-3)),
    "whp": ("reinforce.learning_rate", (1e-4, 3e-4)),
    "whp-decode": ("reinforce.learning_rate", (1e-4, 3e-4)),
    "guard": ("decoding.threshold", (0.2, 0.5)),
}
"""The same for the embedded language model. SSD changes nothing from alpha = |D| / |F| on, here 2.7."""


def grids_of(task: str) -> Grids:
    """What is tried on the task of this name."""
    return GRIDS if task == "harness" else EMBEDDED_GRIDS


def score(model: ModelEvidence, before: ModelEvidence, gold: ModelEvidence) -> float:
    """How well a method erased and kept, between 0 and 1."""
    p, start, aim = (_value(m, "probability/forget") for m in (model, before, gold))
    closeness = max(0.0, 1 - abs(p - aim) / max(start - aim, 1e-9))
    kept = min(1.0, _value(model, "model_utility") / max(_value(before, "model_utility"), 1e-9))
    return 2 * closeness * kept / (closeness + kept) if closeness + kept > 0 else 0.0


def tune(
    task: Task,
    names: Sequence[str],
    table: Mapping[str, Mapping[str, Any]],
    folder: Path,
    run: Run,
    grids: Grids = GRIDS,
) -> dict[str, dict[float, float]]:
    """The score of every method at every value of its grid, on the validation seed of the task; resumes."""
    quick = dataclasses.replace(task, probes=tuple(probes(TOFU_BATTERY, max_new_tokens=task.max_new_tokens)))
    scores: dict[str, dict[float, float]] = {}
    for name in names:
        setting, values = grids.get(name, grids["*"])
        methods = [method for value in values for method in tuned([name], table, {setting: value})]
        before, gold, *erased = compare(quick, methods, folder, seeds=[VALIDATION_SEED], run=run).models
        scores[name] = {value: score(model, before, gold) for value, model in zip(values, erased, strict=True)}
    return scores


def to_markdown(scores: Mapping[str, Mapping[float, float]], grids: Grids) -> str:
    """A line a method: what was tried, the scores, and the value with the best one."""
    lines = ["| method | setting | tried | score | taken |", "|:--|:--|:--|:--|--:|"]
    for name, found in scores.items():
        tried, reached = (", ".join(f"{x:.3g}" for x in numbers) for numbers in (found, found.values()))
        best = f"{max(found, key=found.__getitem__):g}" if len(set(found.values())) > 1 else "-"
        lines.append(f"| {name} | {grids.get(name, grids['*'])[0]} | {tried} | {reached} | {best} |")
    return "\n".join(lines)


def _value(model: ModelEvidence, name: str) -> float:
    return next(v.value for reading in model.readings for v in reading.values if v.name == name)
