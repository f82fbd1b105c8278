"""ADEPT against full training and against other ways to expand, on a real language model.

The embedded model has read WikiText-2, which should stay while it learns GSM8K. Losses on both are measured along the
way, and arms are compared where they have learned the domain equally well. Each way to train takes the best of three
rates on a seed that is not reported: the one that ends with the lowest sum of both losses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.keep.adept import Adept, Choice
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
from palimpsest.write.finetune import Finetune

STEPS, EVERY, COPIES, REFRESH = 32, 8, 4, 8
BATCH = READING.training.batch_size
MEASURED, PROBED = 24, 16
RATE_SEED = 1000
RATES = {
    "all weights": (1e-5, 3e-5, 1e-4),
    "adapters": (1e-4, 3e-4, 1e-3),
    "copies": (1e-4, 3e-4, 1e-3),
    "copies by tensor": (1e-4, 3e-4, 1e-3),
}
"""The ways to train, and the rates of which each takes the best."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train and, where blocks are copied, which ones."""

    way: str
    choice: Choice = "least"

    def method(self, rate: float) -> Method:
        """What is compared; all but the rate is as the text was read."""
        training = dataclasses.replace(READING.training, learning_rate=rate)
        if self.way == "all weights":
            return Finetune(training=training)
        if self.way == "adapters":
            return Finetune(training=dataclasses.replace(training, lora_rank=16))
        return Adept(
            copies=COPIES,
            choice=self.choice,
            unit_rates=self.way == "copies by tensor",
            refresh=REFRESH,
            probed=PROBED,
            training=training,
        )


ARMS = {
    "all weights": Arm("all weights"),
    "adapters (LoRA)": Arm("adapters"),
    "spread evenly (LLaMA-Pro)": Arm("copies", "uniform"),
    "spread evenly, rates by tensor": Arm("copies by tensor", "uniform"),
    "least needed, one rate": Arm("copies"),
    "least needed, rates by tensor (ADEPT)": Arm("copies by tensor"),
    "most needed, one rate": Arm("copies", "most"),
    "most needed, rates by tensor": Arm("copies by tensor", "most"),
}
ALL, _, EVEN, _, LEAST, ADEPT, MOST, _ = ARMS


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


def kept(path: Path, method: Method, seed: int, run: Run, steps: int = STEPS) -> dict[str, Any]:
    """What was found, from the file where it is there already."""
    if not path.exists():
        path.write_text(json.dumps(tried(method, seed, path.parent, run, steps)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def best_rates(folder: Path, run: Run) -> dict[str, float]:
    """For each way to train the rate with the lowest sum of both losses after half of the steps."""
    best = {}
    for way, rates in RATES.items():
        arm = Arm(way, "uniform")
        ends = {}
        for rate in rates:
            path = folder / f"rate of {way}-{rate:g}.json"
            ends[rate] = sum(kept(path, arm.method(rate), RATE_SEED, run, STEPS // 2)["curve"][-1])
        best[way] = min(ends, key=ends.__getitem__)
    return best


def measure(seeds: Sequence[int], folder: Path, run: Run) -> Outcome:
    """Every arm of every seed, at the best rate; kept in the folder."""
    rates = best_rates(folder, run)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed in seeds:
        for name, arm in ARMS.items():
            rate = rates[arm.way]
            found[name].append(kept(folder / f"{name}-{rate:g}-{seed}.json", arm.method(rate), seed, run))
    curves = {name: [np.array(each["curve"]) for each in rows] for name, rows in found.items()}
    return judge(curves, found, rates)


def judge(
    curves: dict[str, list[np.ndarray]], found: dict[str, list[dict[str, Any]]], rates: dict[str, float]
) -> Outcome:
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
        note="Changes of loss in nats a token; below 0 is better than before. Rates: "
        + ", ".join(f"{way} {rate:g}" for way, rate in rates.items())
        + ".",
    )


REPRODUCTION = Reproduction(
    claim="Copies of the blocks that general text needs least, trained at rates by tensor, learn a domain and keep "
    "more general ability than training all weights or spreading the copies evenly.",
    source="Zhang et al. 2025 (arXiv 2510.10071)",
    setting=f"The embedded model after it read {READ} paragraphs of WikiText-2, a kind of text that is to be kept; "
    f"{STEPS} steps of {BATCH} problems of GSM8K; {COPIES} of 30 blocks are copied, tensors measured every {REFRESH} "
    f"steps; rates chosen on seed {RATE_SEED}.",
    paper="Qwen3-1.7B on mathematics: GSM8K 57.6 before, all weights 51.9, LLaMA-Pro 60.0, ADEPT 70.5; MMLU 62.6, "
    "60.1, 61.5, 62.6.",
    measure=measure,
)
