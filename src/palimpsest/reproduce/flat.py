"""FLAT on the small harness, at matched forgetting and at three times the steps.

All methods see the forget set alone. Each trains until the forget answers have a mean probability of at most 0.1, is
measured, and goes on to three times that many steps: that is where ascent runs away and a bounded loss should not.
Learning rate and batch are those of the specification, the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from palimpsest.audit.answers import answers
from palimpsest.data.records import Roles
from palimpsest.erase.flat import DIVERGENCES, FLAT
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.erase.npo import NPO
from palimpsest.erase.preference import IdkDPO
from palimpsest.models.model import Model
from palimpsest.report.evidence import write_atomically
from palimpsest.reproduce.harness import biographies, learned
from palimpsest.reproduce.judging import Seeds, above, at_most, row
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.system import Method
from palimpsest.train import Training

FORGOTTEN = 0.1
EVERY, MOST, LONGER = 2, 200, 3
TRAINING = Training(
    learning_rate=1e-4, epochs=60, batch_size=16, weight_decay=0.0, warmup_epochs=0.0, decay="constant",
    micro_tokens=4096,
)  # fmt: skip
METHODS: Mapping[str, Method] = {
    "gradient ascent": GradientAscent(training=TRAINING),
    "NPO": NPO(retain="none", training=TRAINING),
    "DPO": IdkDPO(training=TRAINING),
    **{f"FLAT {name}": FLAT(divergence=name, training=TRAINING) for name in DIVERGENCES},  # type: ignore[arg-type]
}
POINTS = ("forgotten", "three times")
MEASURES = ("forget P", "forget CE", "retain P", "world P")


def measured(model: Model, data: Roles, run: Run) -> dict[str, float]:
    """Mean probability of the answers of each set, and the cross-entropy of the forget answers, nats a token."""
    found = {}
    for role in ("forget", "retain", "world"):
        nll = np.array([answer.mean_nll for answer in answers(model, data.probe(role), run)])
        found[f"{role} P"] = float(np.exp(-nll).mean())
        if role == "forget":
            found["forget CE"] = float(nll.mean())
    return found


class Course:
    """Measures a method where it has forgotten, and again at three times the steps."""

    def __init__(self, data: Roles, run: Run) -> None:
        self.data, self.run = data, run.replace(progress=False)
        self.found: dict[str, dict[str, float]] = {}
        self.end = MOST

    def look(self, step: int, student: Model) -> bool:
        """Whether the course is at its end."""
        due = step % EVERY == 0 and not self.found
        if due or step >= self.end:
            now = {**measured(student, self.data, self.run.replace(cache={})), "steps": float(step)}
            student.network.train()
            if self.found:
                self.found[POINTS[1]] = now
            elif now["forget P"] <= FORGOTTEN:
                self.found[POINTS[0]] = now
                self.end = LONGER * step
        return step >= self.end


def course(method: Method, model: Model, data: Roles, run: Run) -> dict[str, dict[str, float]]:
    """The measures at both points; empty where the answers were not forgotten in time."""
    watch = Course(data, run)
    method.apply(model, Roles(forget=data.forget), run.replace(stop=watch.look, folder=None))
    return watch.found


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Every method on every seed; what was measured is kept in the folder."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in ("before", *METHODS)}
    for seed in seeds:
        data, own = biographies(seed), run.replace(seed=seed)
        for name in found:
            path = folder / f"{name.replace(' ', '-')}-{seed}.json"
            if not path.exists():
                model = learned(seed, folder.parent, run)
                done = {POINTS[0]: measured(model, data, own)} if name == "before" else {}
                result = done or course(METHODS[name], model, data, own)
                write_atomically(path, json.dumps(result))
            found[name].append(json.loads(path.read_text(encoding="utf-8")))
    return judge(found)


def judge(found: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> Outcome:
    """The outcome that the measures show."""

    def of(name: str, point: str, measure: str) -> Seeds:
        return np.array([seed[point][measure] for seed in found[name] if point in seed])

    rows = [row("before", {m: of("before", POINTS[0], m) for m in MEASURES})]
    for name in METHODS:
        for point in POINTS:
            columns = {m: of(name, point, m) for m in (*MEASURES, "steps")}
            rows.append(row(f"{name}, {point}", columns))
    rows[0]["steps"] = "-"
    last = POINTS[1]
    checks = []
    for variant in (name for name in METHODS if name.startswith("FLAT")):
        ce, ascent = of(variant, last, "forget CE"), of("gradient ascent", last, "forget CE")
        checks.append(at_most(f"{variant}: forget CE at most half of ascent's", ce, ascent / 2))
        for other in ("gradient ascent", "NPO"):
            for measure in ("retain P", "world P"):
                words = f"{variant}: {measure} above that of {other} at three times the steps"
                checks.append(above(words, of(variant, last, measure), of(other, last, measure)))
    for variant in (name for name in METHODS if name.startswith("FLAT")):
        mine, theirs = of(variant, POINTS[0], "world P"), of("NPO", POINTS[0], "world P")
        checks.append(above(f"{variant}: world P above NPO's where both have forgotten", mine, theirs))
    return Outcome(
        rows=rows,
        checks=tuple(checks),
        note="Hardly any word of the templates, the refusals of this library, is in the harness's vocabulary: the "
        "template side is weak here, and what is tested is that the forget side stays bounded.",
    )


REPRODUCTION = Reproduction(
    claim="With forget data alone FLAT neither diverges nor collapses, where ascent does.",
    source="Wang et al. 2025 (arXiv 2410.11143)",
    setting=f"A 0.23 M-parameter model over 48 generated biographies, 8 people to forget. Learning rate "
    f"{TRAINING.learning_rate:g}, batch {TRAINING.batch_size}, measured every {EVERY} steps; forgotten means a mean "
    f"answer probability of at most {FORGOTTEN}.",
    paper="Its tables could not be read. Trial of the specification on a similar harness, world P where forgotten and "
    "at three times the steps: GA .75, .000; NPO .79, .014; DPO .35, .098; FLAT .44 to .53, .029 to .087.",
    measure=measure,
)
