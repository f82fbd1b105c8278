"""Every baseline eraser on the small harness: one table, three seeds.

The claim is the order that the literature agrees on; each part of it can fail here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palimpsest.comparison import compare
from palimpsest.report.evidence import Evidence
from palimpsest.reproduce.runner import Check, Outcome, Reproduction, Verdict
from palimpsest.run import Run
from palimpsest.tasks import BASELINES, HARNESS, harness_task, publish, tuned

COLUMNS = {
    "forget P": "probability/forget",
    "log10 FQ": "log10_forget_quality",
    "utility": "model_utility",
    "retain P": "probability/retain",
    "world P": "probability/world",
    "AUC Min-K": "auc/min-k",
    "robustness": "robustness",
    "gibberish": "gibberish/forget",
}


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """The table of all baselines and the verdicts on the order."""
    found = compare(harness_task(), tuned(BASELINES, HARNESS), folder, seeds=seeds, run=run, default="npo")
    publish(found, folder)
    return judge(found)


def judge(found: Evidence) -> Outcome:
    """The outcome that the evidence shows."""
    names = list(dict.fromkeys(model.name for model in found.models))
    table = {name: {column: _values(found, name, value) for column, value in COLUMNS.items()} for name in names}
    rows = [{"model": name} | {column: _text(x) for column, x in table[name].items()} for name in names]
    checks = (
        _check(
            "gradient ascent ruins utility (below half of before)", table, "gradient-ascent", "before", "utility", 0.5
        ),
        _check(
            "gradient ascent damages the world set (below 0.9 of before)",
            table,
            "gradient-ascent",
            "before",
            "world P",
            0.9,
        ),
        _more("NPO keeps more utility than gradient ascent", table, "npo", "gradient-ascent", "utility"),
        _more("PO only covers up: its forget probability stays above NPO's", table, "po", "npo", "forget P"),
        _more("NPO forgets more than fine-tuning on the retain set", table, "retain-finetune", "npo", "forget P"),
    )
    return Outcome(
        rows=rows,
        checks=checks,
        note="Every method runs at the learning rate that validation chose for it, not at matched forgetting: for "
        "ascent and KL that is one at which they forget little, and so ruin little. The reproduction of FLAT compares "
        "ascent and NPO where both have forgotten.",
    )


def _values(found: Evidence, name: str, value: str) -> np.ndarray:
    readings = [reading for model in found.models if model.name == name for reading in model.readings]
    return np.array([v.value for reading in readings for v in reading.values if v.name == value])


def _text(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def _check(expected: str, table: dict, name: str, other: str, column: str, share: float) -> Check:
    x, y = table[name][column], table[other][column]
    return Check(expected=expected, found=f"{_text(x)} against {_text(y)}", verdict=_above(share * y, x))


def _more(expected: str, table: dict, name: str, other: str, column: str) -> Check:
    x, y = table[name][column], table[other][column]
    return Check(expected=expected, found=f"{_text(x)} against {_text(y)}", verdict=_above(x, y))


def _above(x: np.ndarray, y: np.ndarray) -> Verdict:
    """Whether x is above y for every seed; a seed without a value decides nothing."""
    if len(x) != len(y) or not len(x):
        return "inconclusive"
    return "holds" if (x > y).all() else "does not hold" if (x <= y).all() else "inconclusive"


REPRODUCTION = Reproduction(
    claim="Gradient ascent forgets and wrecks the model; NPO forgets and keeps more; refusals only cover up.",
    source="TOFU, NPO and OpenUnlearning",
    setting="A 0.23 M-parameter model over 48 generated biographies, 8 people to forget, 40 capitals never used.",
    paper="Llama-3.2-1B, TOFU forget10, forget quality / utility: GA 1.06e-239 / 0, GD 1.06e-239 / 0.49, "
    "IdkDPO 4.6e-12 / 0.23, NPO 0.02 / 0.46, SimNPO 2.5e-203 / 0.54, RMU 3.2e-15 / 0.59, before 1.7e-21 / 0.60.",
    measure=measure,
)
