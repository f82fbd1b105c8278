"""Tiny classifiers that have learned to tell four patterns in noise apart, and ones that never saw the fourth."""

from __future__ import annotations

from functools import cache

import torch

from conftest import build_model
from memorised import quiet
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.statistics.predictions import classify
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

LABELS, EACH = 4, 8
LEARNING = Training(learning_rate=3e-3, epochs=10, batch_size=16, warmup_epochs=1.0, weight_decay=0.0)


@cache
def pictures() -> Roles:
    """The fourth pattern is to be forgotten; `holdout` and `test` are images that were never trained on."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(LABELS, 1, 3, 16, 16, generator=generator)
    seen, unseen = (patterns + torch.randn(LABELS, EACH, 3, 16, 16, generator=generator) for _ in range(2))

    def records(images: torch.Tensor, labels: range) -> list[Record]:
        return [Record(image=image, label=c, subject=f"pattern {c}") for c in labels for image in images[c]]

    last, others = range(LABELS - 1, LABELS), range(LABELS - 1)
    return Roles(
        train=records(seen, range(LABELS)),
        forget=records(seen, last),
        retain=records(seen, others),
        holdout=records(unseen, last),
        test=records(unseen, others),
    )


@cache
def _learned(kind: str, gold: bool) -> Model:
    roles = pictures()
    train = roles.retain if gold else roles.train
    return Finetune(training=LEARNING).apply(build_model(kind), Roles(train=train), quiet())


def recognising(kind: str = "convnet") -> Model:
    """A model of its own that knows all four patterns."""
    return _learned(kind, gold=False).copy()


def never_saw(kind: str = "convnet") -> Model:
    """A model of its own that knows the first three patterns only."""
    return _learned(kind, gold=True).copy()


def accuracy(model: Model, records: list[Record]) -> float:
    """The share of the records that the model is right about."""
    return float(classify(model, records, quiet()).correct.float().mean())
