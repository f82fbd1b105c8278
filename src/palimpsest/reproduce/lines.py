"""LiNeS against plain interpolation, and inside merging, on a real language model that has something to lose.

The embedded model has read WikiText-2, which should stay (`reader`). It is fine-tuned on GSM8K and, from the same
start, on PubMedQA. What the first one learned is scaled, by depth or by one number: nothing is chosen there, every
scaling of the sweep counts, and fronts are compared where the domain is known equally well. Then both are merged; the
scale of each merging is the one with the lowest loss on other problems and abstracts than the table's. The learning
rate is the usual one of the library for this model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.data.records import Roles
from palimpsest.keep.lines import LiNeS
from palimpsest.keep.merging import Merge
from palimpsest.models.loading import load
from palimpsest.reproduce.domains import (
    LENGTH,
    READ,
    Losses,
    at_equal_domain_loss,
    domain_roles,
    learning_against_forgetting,
    medical_roles,
    reader,
)
from palimpsest.reproduce.judging import Seeds, above, below, row
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

STEPS, BATCH, MEASURED = 100, 4, 24
LEARN = Finetune(
    training=Training(
        learning_rate=1e-4, epochs=1, batch_size=BATCH, weight_decay=0.0, warmup_epochs=0.1, max_length=LENGTH
    )
)
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
KINDS = {"by depth (LiNeS)": "linear", "one number (WiSE-FT)": "uniform", "by depth, reversed": "reversed"}
LINES, WISE, REVERSED = KINDS

SCALES = (0.3, 0.6, 0.9, 1.2, 1.5)
MERGINGS = {
    "sum (task arithmetic)": Merge(),
    "sum, by depth (LiNeS)": Merge(layer_scaling=True),
    "TIES": Merge(rule="ties"),
    "TIES, by depth (LiNeS)": Merge(rule="ties", layer_scaling=True),
}
SUM, SUM_LINES, TIES, TIES_LINES = MERGINGS
TABLE = ("domain", "medical", "kept")
PLANE = ("domain", "kept")
COLUMNS = ("domain", "second domain", "kept text", "scale")

Found = dict[str, dict[str, Any]]
"""`front`: by kind, (domain, kept) of every alpha. `merged`: by model, its losses as in TABLE and the scale taken."""


def tried(seed: int, folder: Path, run: Run, steps: int = STEPS) -> Found:
    """Both experiments of one seed."""
    data = domain_roles(seed, steps * BATCH, 2 * MEASURED, 1)
    medical = medical_roles(seed, steps * BATCH, 2 * MEASURED)
    start = str(reader(seed, data, folder, run))
    base = load(start, run=run)
    choice, test = (
        Roles(domain=data.domain[part], medical=medical.medical[part], kept=data.kept[part])
        for part in (slice(MEASURED), slice(MEASURED, None))
    )
    choosing, plane, measured = (
        Losses(base, pieces, run, roles) for pieces, roles in ((choice, TABLE[:2]), (test, PLANE), (test, TABLE))
    )
    own = run.replace(seed=seed, in_place=False, folder=None)
    solver, doctor = (LEARN.apply(base, Roles(train=learned.train), own) for learned in (data, medical))
    merged: dict[str, Any] = {
        title: {"losses": measured(model), "scale": None}
        for title, model in (("before", base), ("problems alone", solver), ("abstracts alone", doctor))
    }
    saved = folder / f"abstracts-{seed}"
    doctor.save_pretrained(saved)
    for title, merging in MERGINGS.items():
        made = [dataclasses.replace(merging, base=start, models=(str(saved),), scale=scale) for scale in SCALES]
        losses = [sum(choosing(method.apply(solver, data, own))) for method in made]
        best = min(range(len(SCALES)), key=losses.__getitem__)
        merged[title] = {"losses": measured(made[best].apply(solver, data, own)), "scale": SCALES[best]}
    front = {
        title: [plane(LiNeS(base=start, schedule=kind, alpha=alpha).apply(solver, data, own)) for alpha in ALPHAS]  # type: ignore[arg-type]
        for title, kind in KINDS.items()
    }
    return {"front": front, "merged": merged}


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Every seed; kept in the folder."""
    found = []
    for seed in seeds:
        path = folder / f"found-{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(tried(seed, folder, run)), encoding="utf-8")
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return judge(found)


def judge(found: Sequence[Found]) -> Outcome:
    """The outcome: means over the domain losses that all kinds reach, and merged models at their own best scales."""
    fronts = [{title: np.array(points) for title, points in each["front"].items()} for each in found]
    kept: dict[str, list[float]] = {title: [] for title in KINDS}
    for front in fronts:
        lowest = max(points[:, 0].min() for points in front.values())
        highest = min(points[:, 0].max() for points in front.values())
        levels = np.linspace(lowest, highest, 9)
        for title, points in front.items():
            kept[title].append(float(np.mean([at_equal_domain_loss(points, level) for level in levels])))
    means = {title: np.array(values) for title, values in kept.items()}
    before = np.array([front[WISE][0] for front in fronts])  # alpha 0: nothing of what was learned
    after = np.array([front[WISE][-1] for front in fronts])
    losses = {title: np.array([each["merged"][title]["losses"] for each in found]) for title in found[0]["merged"]}
    both = {title: own[:, :2].mean(1) for title, own in losses.items()}
    checks = (
        below("fine-tuning learns the domain", after[:, 0], before[:, 0]),
        above("and costs kept text", after[:, 1], before[:, 1]),
        below("at equal domain loss LiNeS keeps more than one number", means[LINES], means[WISE]),
        above("the reversed schedule keeps less than LiNeS", means[REVERSED], means[LINES]),
        below("merged by depth, the sum knows both domains better", both[SUM_LINES], both[SUM]),
        below("and so does TIES", both[TIES_LINES], both[TIES]),
    )
    none: Seeds = np.empty(0)
    rows = [
        _row(f"{title}, alpha {alpha:g}", front_at[:, 0], none, front_at[:, 1], none)
        for title in KINDS
        for i, alpha in enumerate(ALPHAS)
        for front_at in [np.array([front[title][i] for front in fronts])]
    ]
    rows += [_row(f"{title}, mean at equal domain loss", none, none, means[title], none) for title in KINDS]
    for title, own in losses.items():
        scales = [each["merged"][title]["scale"] for each in found]
        rows.append(_row(title, *own.T, np.array([s for s in scales if s is not None])))
    drawn = learning_against_forgetting("lines", {title: [front[title] for front in fronts] for title in KINDS})
    return Outcome(rows=rows, checks=checks, figures=(drawn,), note="Losses in nats a token.")


def _row(title: str, *numbers: Seeds) -> dict[str, str]:
    return row(title, dict(zip(COLUMNS, numbers, strict=True)))


REPRODUCTION = Reproduction(
    claim="Scaling what fine-tuning changed by depth keeps more of what the model knew, at the same gain, than one "
    "number for all layers; and models merged so know their tasks better.",
    source="Wang et al. 2025 (arXiv 2410.17146)",
    setting=f"The embedded model after it read {READ} paragraphs of WikiText-2, fine-tuned for {STEPS} steps of "
    f"{BATCH} problems of GSM8K and, for merging, of as many answers of PubMedQA; {MEASURED} other pieces of "
    f"each and of WikiText-2 are measured. Merging tries the scales {', '.join(map(str, SCALES))} on {MEASURED} more.",
    paper="CLIP ViT-B/32, mean over 8 tasks: fine-tuned 90.5 on its own task and 38.0 on the others, with LiNeS 90.3 "
    "and 48.0; before 48.3 on the others. Merging 8 tasks by task arithmetic: 4.5 points more with LiNeS.",
    measure=measure,
)
