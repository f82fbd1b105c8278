"""ADEPT against full training and against other ways to expand, on a real language model.

The embedded model has read WikiText-2, which should stay while it learns GSM8K. Losses on both are measured along the
way, and arms are compared where they have learned the domain equally well. Two rates, one for all weights and one that
the expansions share, were chosen on seed 1000: the lower of 3e-5 and 1e-4, and of 3e-4 and 1e-3, since both of either
pair learn at least 0.3 nats in 16 steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.keep.adept import Adept
from palimpsest.models.loading import load
from palimpsest.models.model import Model
from palimpsest.reproduce.domains import (
    READ,
    READING,
    Losses,
    at_equal_domain_loss,
    domain_roles,
    learning_against_forgetting,
    reader,
)
from palimpsest.reproduce.judging import Seeds, at_most, row
from palimpsest.reproduce.runner import Outcome, Reproduction
from palimpsest.run import Run
from palimpsest.system import Method
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

STEPS, EVERY, COPIES, REFRESH = 32, 8, 4, 8
BATCH = READING.training.batch_size
MEASURED, PROBED = 24, 16
FULL_RATE, COPIES_RATE = 3e-5, 3e-4


def training(rate: float) -> Training:
    """The same for every arm but for the rate; all else as the text was read."""
    return dataclasses.replace(READING.training, learning_rate=rate)


def arms(full_rate: float = FULL_RATE, copies_rate: float = COPIES_RATE) -> dict[str, Method]:
    """What is compared."""
    copied: dict[str, Any] = {"copies": COPIES, "refresh": REFRESH, "probed": PROBED, "training": training(copies_rate)}
    return {
        "all weights": Finetune(training=training(full_rate)),
        "spread evenly (LLaMA-Pro)": Adept(choice="uniform", unit_rates=False, **copied),
        "least needed, one rate": Adept(unit_rates=False, **copied),
        "least needed, rates by tensor (ADEPT)": Adept(**copied),
        "most needed, one rate": Adept(choice="most", unit_rates=False, **copied),
    }


ALL, EVEN, LEAST, ADEPT, MOST = list(arms())


def tried(method: Method, seed: int, folder: Path, run: Run, steps: int = STEPS) -> dict[str, Any]:
    """The curve of losses on the domain and on the kept text, and what the method noted."""
    data = domain_roles(seed, steps * BATCH, MEASURED, PROBED)
    model = load(reader(seed, data, folder, run), run=run)
    losses = Losses(model, data, run)
    curve = [losses(model)]

    def stop(step: int, model: Model) -> bool:
        if step % EVERY == 0:
            curve.append(losses(model))
        return False

    own = run.replace(seed=seed, in_place=True, folder=None, stop=stop)
    trained = method.apply(model, data, own)
    entry = trained.ledger.entries[-1]
    return {"curve": curve, "seconds": entry.seconds, "notes": entry.notes}


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Every arm of every seed; kept in the folder."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms()}
    for seed in seeds:
        for name, method in arms().items():
            path = folder / f"{name}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(tried(method, seed, folder, run)), encoding="utf-8")
            found[name].append(json.loads(path.read_text(encoding="utf-8")))
    return judge({name: [np.array(each["curve"]) for each in rows] for name, rows in found.items()}, found)


def judge(curves: dict[str, list[np.ndarray]], found: dict[str, list[dict[str, Any]]]) -> Outcome:
    """The outcome that the curves show: what is kept where all arms know the domain as well as the slowest one."""
    count = len(next(iter(curves.values())))
    levels = [max(curves[name][i][:, 0].min() for name in curves) for i in range(count)]

    def lost(name: str) -> Seeds:
        return np.array([at_equal_domain_loss(c, x) - c[0, 1] for c, x in zip(curves[name], levels, strict=True)])

    def end(name: str, column: int) -> Seeds:
        return np.array([c[-1, column] - c[0, column] for c in curves[name]])

    importance = [np.array(each["notes"]["layer_importance"]) for each in found[LEAST]]
    checks = (
        at_most("copies of the least needed blocks cost no more than evenly spread ones", lost(LEAST), lost(EVEN)),
        at_most("these no more than training all weights", lost(EVEN), lost(ALL)),
        at_most("rates by tensor cost no more than one rate", lost(ADEPT), lost(LEAST)),
        at_most("copies of the least needed cost no more than of the most needed", lost(LEAST), lost(MOST)),
        at_most(
            "blocks differ: the median one matters at most a tenth of the most needed",
            np.array([np.median(each) / each.max() for each in importance]),
            0.1,
        ),
    )
    rows = [
        row(
            name,
            {
                "kept text, at equal domain loss": lost(name),
                "kept text, at the end": end(name, 1),
                "domain, at the end": end(name, 0),
                "seconds": np.array([each["seconds"] for each in found[name]]),
            },
        )
        for name in curves
    ]
    return Outcome(
        rows=rows,
        checks=checks,
        figures=(learning_against_forgetting("adept", curves),),
        note="Changes of loss in nats a token; below 0 is better than before.",
    )


REPRODUCTION = Reproduction(
    claim="Copies of the blocks that general text needs least, trained at rates by tensor, learn a domain and keep "
    "more general ability than training all weights or spreading the copies evenly.",
    source="Zhang et al. 2025 (arXiv 2510.10071)",
    setting=f"The embedded model after it read {READ} paragraphs of WikiText-2, a kind of text that is to be kept; "
    f"{STEPS} steps of {BATCH} problems of GSM8K; {COPIES} of 30 blocks are copied, tensors measured every {REFRESH} "
    "steps.",
    paper="Qwen3-1.7B on mathematics: GSM8K 57.6 before, all weights 51.9, LLaMA-Pro 60.0, ADEPT 70.5; MMLU 62.6, "
    "60.1, 61.5, 62.6.",
    measure=measure,
)
