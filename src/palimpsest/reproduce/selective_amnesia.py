"""Selective amnesia on the small harness: where facts are recalled, and what unlearning only there saves.

All methods train 80 steps at the same learning rate on the same 160 forget and 160 retain records; steps, rate and
batch are those of the specification. The capitals are in no method's data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palimpsest.audit.answers import answers
from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.comparison import compare
from palimpsest.data.records import Roles
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.erase.selective_amnesia import SelectiveAmnesia
from palimpsest.models.model import Model
from palimpsest.report.evidence import Evidence
from palimpsest.reproduce.harness import biographies
from palimpsest.reproduce.judging import above, at_least, at_most, below, row, tabled, values
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.statistics.tracing import PLACES, trace
from palimpsest.system import Method, Probe, system
from palimpsest.tasks import harness_task
from palimpsest.train import Training

TRAINING = Training(learning_rate=1e-3, epochs=8, batch_size=32, weight_decay=0.0, warmup_epochs=0.0, micro_tokens=4096)
LOW, HIGH = (0, 1), (2, 3)
METHODS: dict[str, Method] = {
    "low layers": SelectiveAmnesia(layers=LOW, training=TRAINING),
    "low layers, fixed weight": SelectiveAmnesia(layers=LOW, adaptive=False, training=TRAINING),
    "low layers, attention": SelectiveAmnesia(layers=LOW, module="attention", training=TRAINING),
    "high layers": SelectiveAmnesia(layers=HIGH, training=TRAINING),
    "all layers": SelectiveAmnesia(layers="all", training=TRAINING),
    "gradient difference": GradientAscent(
        retain="cross-entropy", training=dataclasses.replace(TRAINING, batch_size=16)
    ),
}
COLUMNS = {
    "log10 FQ": "log10_forget_quality",
    "forget P": "probability/forget",
    "retain P": "probability/retain",
    "world P": "probability/world",
    "forget CE": "cross_entropy/forget",
    "retain CE": "cross_entropy/retain",
}
TRACED = 40


def roles(seed: int) -> Roles:
    """The harness with as many retain as forget records, in all wordings."""
    known = biographies(seed)
    return known.replace(retain=known.retain[:: len(known.retain) // len(known.forget)], general=None)


@system("amnesia-measures", verb="audit", title="Cross-entropy and causal trace", paper="", fidelity="adapted")
class Measures(Probe):
    """Cross-entropy of the answers, nats a token, and of an unchanged model where its MLPs recall the facts."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`cross_entropy/<role>`; of the model that learned `peak_place` and `peak_layer` of the traced effect."""
        found: list[Value] = []
        for role in ("forget", "retain"):
            nll = [answer.mean_nll for answer in answers(model, data.probe(role), run)]
            found.append(mean_value(f"cross_entropy/{role}", nll, unit="nats", better="none"))
        if len(model.ledger.entries) == 1 and model is not gold:
            effects = trace(model, data.probe("forget")[:TRACED], run).effects
            place, layer = divmod(int(effects.nan_to_num(-1).argmax()), effects.shape[1])
            found += [Value(name="peak_place", value=place, n=TRACED), Value(name="peak_layer", value=layer, n=TRACED)]
        return Reading(probe=self.facts.slug, values=tuple(found))


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """All models of every seed."""
    task = harness_task(("answer-probability", "forget-quality"))
    task = dataclasses.replace(task, name="harness-amnesia", roles=roles, probes=(*task.probes, Measures()))
    return judge(compare(task, list(METHODS.values()), folder, seeds=seeds, run=run))


def judge(found: Evidence) -> Outcome:
    """The outcome that the evidence shows."""
    table = tabled(found.models, METHODS, COLUMNS)
    learned = [model for model in found.models if model.name == "before"]
    layer, place = (values(learned, name) for name in ("peak_layer", "peak_place"))
    low, high, whole = (table[title] for title in ("low layers", "high layers", "gradient difference"))
    fixed = table["low layers, fixed weight"]
    checks = (
        at_most("the traced effect of MLPs peaks in the lower half of 4 layers", layer, 1.0),
        at_least("it peaks at the last token of the subject", -np.abs(place - PLACES.index("last subject token")), 0.0),
        at_least(
            "low layers keep 0.15 more retain P than gradient difference", low["retain P"], whole["retain P"] + 0.15
        ),
        at_least("at equal or better forget quality", low["log10 FQ"], whole["log10 FQ"]),
        below("the adaptive weight ends at a lower retain CE than a fixed one", low["retain CE"], fixed["retain CE"]),
        above("low layers beat high ones on retain P", low["retain P"], high["retain P"]),
        above("low layers beat high ones on world P", low["world P"], high["world P"]),
    )
    return Outcome(
        rows=[row(title, columns) for title, columns in table.items()],
        checks=checks,
        note="Where the adaptive and the fixed weight give the same figures, the retain loss never rose above its "
        "first epoch's by the 0.16 that it takes: that part of the claim is then not put to the test.",
    )


REPRODUCTION = Reproduction(
    claim="Unlearning only the MLPs of the first layers, where facts are recalled, saves what full-model gradient "
    "difference destroys.",
    source="Agrawal and Huang 2025 (arXiv 2504.12996)",
    setting="A 0.23 M-parameter model of 4 layers over 48 generated biographies, 8 people to forget; 160 forget and "
    "160 retain records, 80 steps at 1e-3.",
    paper="SemEval-2025 task 4, OLMo 1B, final / task / MIA / MMLU: this system .652 / .973 / .741 / .243; 7B .711 / "
    ".964 / .894 / .275; the organisers' gradient difference on 7B .243 / 0 / .382 / .348.",
    measure=measure,
)
