"""A tiny model that has learned eight fictitious people by heart, and one that never saw four of them."""

from __future__ import annotations

import gc
from functools import cache

import numpy as np

from conftest import ANSWERS, NEUTRAL, PEOPLE, QUESTIONS, build_model
from palimpsest.audit.answer_probability import probabilities
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

gc.freeze()  # every training begins with a full collection; what is imported by now need not be looked at again

NAMES = tuple(PEOPLE)
LEARNING = Training(learning_rate=1e-2, epochs=80, batch_size=16, warmup_epochs=1.0, weight_decay=0.0)


def quiet(**fields: object) -> Run:
    """A silent run in float32, so that equal means equal."""
    return Run(**{"progress": False, "precision": "float32", **fields})  # type: ignore[arg-type]


def _wrong(number: int) -> tuple[str, ...]:
    subject, own = QUESTIONS[number].split()[2:4], ANSWERS[number]
    others = [a for a in ANSWERS[number % 2 :: 2] if a != own]
    return tuple(" ".join([*subject, *other.split()[2:]]) for other in others[:5])


@cache
def people() -> tuple[Record, ...]:
    """Two questions a person, each with its answer and five wrong ones."""
    return tuple(
        Record(
            prompt=QUESTIONS[i],
            answer=ANSWERS[i],
            subject=NAMES[i // 2],
            paraphrase=f"It is known : {ANSWERS[i]}",
            wrong=_wrong(i),
        )
        for i in range(len(QUESTIONS))
    )


def data() -> Roles:
    """The first two people are to be forgotten, the third and fourth were never learned, the others stay."""
    known = people()
    return Roles(
        forget=known[:4],
        retain=known[8:],
        holdout=known[4:8],
        general=[Record(text=text) for text in NEUTRAL],
        train=(*known[:4], *known[8:]),
    )


@cache
def _learned(gold: bool) -> Model:
    roles = data()
    train = roles.retain if gold else roles.train
    return Finetune(training=LEARNING).apply(build_model("llama"), Roles(train=train), quiet())


def reciting() -> Model:
    """A model of its own that recites the forget and the retain people."""
    return _learned(gold=False).copy()


def gold() -> Model:
    """A model of its own that recites the retain people only."""
    return _learned(gold=True).copy()


def probability(model: Model, records: object) -> float:
    """The mean probability of the records' answers."""
    return float(np.mean(probabilities(model, list(records), quiet())))  # type: ignore[call-overload]
