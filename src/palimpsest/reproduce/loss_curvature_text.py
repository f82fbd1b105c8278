"""Loss-curvature editing on a small language model that knows facts about people and random texts by heart.

Gate and up matrices of all layers are cut; what is left of recited texts, of facts and of the frame of the sentences is
compared where the same share of texts is still recited, interpolated. The sweeps were chosen on seed 1000.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.audit.answers import answers
from palimpsest.audit.curvature_bands import CurvatureBands
from palimpsest.audit.reading import Reading, mean_value
from palimpsest.audit.recitation import Recitation
from palimpsest.comparison import Task, compare
from palimpsest.data.records import Record, Roles
from palimpsest.erase.balanced_subnet import BalancedSubnet
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.erase.loss_curvature import LossCurvature
from palimpsest.models.model import Model
from palimpsest.report.evidence import Evidence
from palimpsest.reproduce.harness import ATTRIBUTES, LEARNING, biographies, lands, new_model
from palimpsest.reproduce.judging import above, at_least, row, tabled, values
from palimpsest.reproduce.loss_curvature import Control, matched_curve
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.system import Method, Probe, system
from palimpsest.train import Training

TEXTS, LENGTH, PREFIX, SUFFIX = 60, 40, 12, 24
MATCHED = 0.3
"""The share of texts still recited at which the cuts are compared."""
GATE_AND_UP = ("mlp_gate", "mlp_up")
RHO = {"both": (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9), "inputs": (0.97, 0.95, 0.93, 0.9, 0.85)}
SHARES = {
    "svd": (0.5, 0.45, 0.4, 0.35, 0.3),
    "random": (0.85, 0.8, 0.75, 0.7, 0.65),
    "magnitude": (0.4, 0.3, 0.25, 0.2),
}
ASCENT = (3e-4, 3.5e-4, 4e-4, 5e-4)
RATIOS, RETAIN_WEIGHT = (0.015, 0.03, 0.05, 0.1), 0.05
VALUES = {value for values in ATTRIBUTES.values() for value in values}
FRAME = {"the", "of", "is", "has", "as", "."}
COLUMNS = ("recited", "distance", "facts", "capitals", "frame")


def texts_and_people(seed: int = 0) -> Roles:
    """The biographies of the harness, and texts of random words to learn by heart: `forget`."""
    people = biographies(seed)
    words = sorted(new_model().tokenizer.get_vocab().keys() - {"<pad>", "<bos>", "<eos>", "<unk>", ":"})
    draw = random.Random(f"{seed}/texts")
    texts = [Record(text=" ".join(draw.choices(words, k=LENGTH))) for _ in range(TEXTS)]
    facts = [*people.retain, *people.forget]
    return Roles(train=[*facts, *people.world, *texts], forget=texts, retain=facts, world=people.world)


@system(
    "loss-curvature-tasks",
    verb="audit",
    title="What is left of recited texts, facts and the frame of sentences",
    paper="",
    fidelity="adapted",
)
class Measures(Probe):
    """Recitation of the texts; shares predicted of values of facts, of capitals, and of the words all answers have."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`recited`, `distance`, `facts`, `capitals` and `frame`."""
        told = Recitation(prefix=PREFIX, suffix=SUFFIX).measure(model, Roles(forget=data.forget), run)
        asked = [record for record in data.retain[::4] if record.answer is not None]
        found: dict[str, Any] = {
            "recited": told.arrays["strict/forget"],
            "distance": told.arrays["distance/forget"],
            "facts": _right(model, asked, VALUES, run),
            "capitals": _right(model, data.world, {town for _, town in lands()}, run),
            "frame": _right(model, asked, FRAME, run),
        }
        return Reading(
            probe=self.facts.slug, values=tuple(mean_value(name, x, seed=run.seed) for name, x in found.items())
        )


def _right(model: Model, records: Sequence[Record], words: set[str], run: Run) -> list[float]:
    """Share of these words predicted in each answer, after the first word: there are two ways to begin one."""
    found = []
    for record, answer in zip(records, answers(model, list(records), run), strict=True):
        chosen = [word in words and place > 0 for place, word in enumerate((record.answer or "").split())]
        found.append(float(answer.correct[answer.words][chosen].mean()))
    return found


def _curves() -> dict[str, list[Method]]:
    how: dict[str, dict[str, Any]] = {
        "K-FAC": {},
        "inputs alone (A)": {"sides": "inputs"},
        "gradients alone (G)": {"sides": "gradients"},
    }
    curves: dict[str, list[Method]] = {
        name: [
            LossCurvature(rho=rho, layers="all", matrices=GATE_AND_UP, **options)
            for rho in RHO["inputs" if options.get("sides") == "inputs" else "both"]
        ]
        for name, options in how.items()
    }
    titles = {"svd": "singular values", "random": "random directions", "magnitude": "smallest weights"}
    for kind, shares in SHARES.items():
        curves[titles[kind]] = [Control(kind=kind, share=share, matrices=GATE_AND_UP) for share in shares]  # type: ignore[arg-type]
    steps = {"epochs": 4, "batch_size": 20, "warmup_epochs": 0.0, "decay": "constant", "weight_decay": 0.0}
    curves["gradient ascent on the texts"] = [
        GradientAscent(training=Training(learning_rate=rate, micro_tokens=4096, **steps))  # type: ignore[arg-type]
        for rate in ASCENT
    ]
    learned = dataclasses.replace(BalancedSubnet().training, micro_tokens=4096)
    curves["balanced subnet, told which"] = [
        BalancedSubnet(ratio=ratio, retain_weight=RETAIN_WEIGHT, training=learned) for ratio in RATIOS
    ]
    return curves


CURVES = _curves()


def task() -> Task:
    """The harness model that learned people, capitals and random texts."""
    return Task(
        name="texts-curvature",
        question="Are the texts no longer recited, and is the rest still there?",
        source=f"biographies of 48 people, 40 capitals, {TEXTS} texts of {LENGTH} random words",
        start=new_model,
        roles=texts_and_people,
        learn=LEARNING,
        probes=(Measures(), CurvatureBands(reference="retain")),
        max_new_tokens=1,
    )


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """All cuts of every seed."""
    methods = [method for curve in CURVES.values() for method in curve]
    return judge(compare(task(), methods, folder, seeds=seeds, run=run))


def judge(found: Evidence) -> Outcome:
    """The outcome that the evidence shows."""
    titled = {f"{name}/{i}": method for name, curve in CURVES.items() for i, method in enumerate(curve)}
    numbers = tabled(found.models, titled, dict(zip(COLUMNS, COLUMNS, strict=True)))
    before = numbers["before"]
    curves = {
        name: matched_curve([before, *(numbers[f"{name}/{i}"] for i in range(len(curve)))], COLUMNS, "recited", MATCHED)
        for name, curve in CURVES.items()
    }
    kfac, svd, chance = (curves[name] for name in ("K-FAC", "singular values", "random directions"))
    learned = [model for model in found.models if model.name == "before"]
    low, high = (values(learned, f"ratio/forget/{band}") for band in ("bottom 50 %", "top 10 %"))
    checks = (
        at_least("before, at least 0.9 of the texts are recited", before["recited"], 0.9),
        at_least("K-FAC keeps as many facts as cutting singular values", kfac["facts"], svd["facts"]),
        above("and more than cutting random directions", kfac["facts"], chance["facts"]),
        above(
            "facts suffer more than the frame of sentences", _lost("facts", before, kfac), _lost("frame", before, kfac)
        ),
        above("texts use the low bands more than the high ones, against the facts", low, high),
    )
    rows = [row("before", before), *(row(f"{name}, at {MATCHED:g} recited", x) for name, x in curves.items())]
    return Outcome(rows=rows, checks=checks, note="A dash stands where a curve never comes down to that share.")


def _lost(column: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> np.ndarray:
    return before[column] - after[column]


REPRODUCTION = Reproduction(
    claim="Cutting the directions of low curvature takes recited texts away first, then facts told without a context, "
    "and the frame of sentences last.",
    source="Merullo et al. 2025 (arXiv 2510.24256)",
    setting="The harness model with 60 texts of 40 random words among its training data; gate and up of all layers are "
    "cut, with factors from all training data. A text is recited where 24 words follow the first 12 without an error. "
    f"Each value is taken where {MATCHED:g} of the texts are still recited, interpolated.",
    paper="OLMo-2 7B, texts of its training data (recited without error, perplexity): before 99.9 %, 19.0; balanced "
    "subnet 6.0 %, 23.6; K-FAC 3.4 %, 22.8; singular values 3.0 %, 22.5. Facts told without a context fell from .78 to "
    ".65, reading tasks from .80 to .80.",
    measure=measure,
)
