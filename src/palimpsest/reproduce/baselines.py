"""Every baseline eraser on the small harness: one table, three seeds.

The claim is the order that the literature agrees on; each part of it can fail here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palimpsest.comparing import publish
from palimpsest.comparison import compare
from palimpsest.report.evidence import Evidence
from palimpsest.reproduce.judging import above, below, row, values
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.tasks import BASELINES, HARNESS, harness_task, tuned

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
    groups = {name: [model for model in found.models if model.name == name] for name in names}
    table = {name: {c: values(models, value) for c, value in COLUMNS.items()} for name, models in groups.items()}
    before, ascent, npo, po, retain = (
        table[name] for name in ("before", "gradient-ascent", "npo", "po", "retain-finetune")
    )
    checks = (
        below("gradient ascent ruins utility (below half of before)", ascent["utility"], 0.5 * before["utility"]),
        below(
            "gradient ascent damages the world set (below 0.9 of before)", ascent["world P"], 0.9 * before["world P"]
        ),
        above("NPO keeps more utility than gradient ascent", npo["utility"], ascent["utility"]),
        above("PO only covers up: its forget probability stays above NPO's", po["forget P"], npo["forget P"]),
        below("NPO forgets more than fine-tuning on the retain set", npo["forget P"], retain["forget P"]),
    )
    return Outcome(
        rows=[row(name, table[name]) for name in names],
        checks=checks,
        note="Every method runs at the learning rate that validation chose for it, not at matched forgetting: for "
        "ascent and KL that is one at which they forget little, and so ruin little. The reproduction of FLAT compares "
        "ascent and NPO where both have forgotten.",
    )


REPRODUCTION = Reproduction(
    claim="Gradient ascent forgets and wrecks the model; NPO forgets and keeps more; refusals only cover up.",
    source="TOFU, NPO and OpenUnlearning",
    setting="A 0.23 M-parameter model over 48 generated biographies, 8 people to forget, 40 capitals never used.",
    paper="Llama-3.2-1B, TOFU forget10, forget quality / utility: GA 1.06e-239 / 0, GD 1.06e-239 / 0.49, "
    "IdkDPO 4.6e-12 / 0.23, NPO 0.02 / 0.46, SimNPO 2.5e-203 / 0.54, RMU 3.2e-15 / 0.59, before 1.7e-21 / 0.60.",
    measure=measure,
)
