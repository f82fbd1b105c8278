"""What every probe starts from, computed once per model and example: token scores and generated answers.

Both are kept in `run.cache` under the digest of the weights, so a model that changed is never taken for the old one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.generation import greedy_answers
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import score

ROLES = ("forget", "retain", "real", "world")
"""The sets that audits look at, where the data has them."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """Token scores of one candidate answer, its end mark left out of `words`."""

    log_prob: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    correct: np.ndarray
    end: int

    @property
    def mean_nll(self) -> float:
        """A: negative log-likelihood a token, end mark included, nats."""
        return -float(self.log_prob.mean())

    @property
    def words(self) -> slice:
        """The positions without the end mark."""
        return slice(0, len(self.log_prob) - self.end)


def scored(model: Model, sequences: Sequence[Encoded], run: Run) -> list[Answer]:
    """The scores of each sequence; only those not yet known for these weights are computed."""
    known = run.cache.setdefault(("scores", model.digest()), {})
    missing = list({(s.tokens, s.start): s for s in sequences if (s.tokens, s.start) not in known}.values())
    if missing:
        found = score(model, missing, run)
        parts = [found.split(x) for x in (found.log_prob, found.mean, found.deviation, found.correct)]
        for sequence, *values in zip(missing, *parts, strict=True):
            log_prob, mean, deviation, correct = values
            known[(sequence.tokens, sequence.start)] = Answer(log_prob, mean, deviation, correct, sequence.end)
    return [known[(s.tokens, s.start)] for s in sequences]


def answers(model: Model, records: Sequence[Record], run: Run) -> list[Answer]:
    """The scores of each record's own answer (or text)."""
    return scored(model, Encoder.of(model).records(records), run)


def alternatives(model: Model, records: Sequence[Record], run: Run) -> tuple[list[Answer], list[list[Answer]]]:
    """For each record the scores of its right answer in other words (else its answer), and of its wrong answers."""
    encoder = Encoder.of(model)
    right, wrong = [], []
    for index, record in enumerate(records):
        if record.prompt is None or record.answer is None or not record.wrong:
            raise PalimpsestError(
                f'"{record.title}" has no wrong answers to compare with; the truth ratio needs the field "wrong".'
            )
        right.append(encoder.pair(record.prompt, record.paraphrase or record.answer, index))
        wrong.append([encoder.pair(record.prompt, text, index) for text in record.wrong])
    flat = scored(model, [*right, *(w for group in wrong for w in group)], run)
    rest = iter(flat[len(right) :])
    return flat[: len(right)], [[next(rest) for _ in group] for group in wrong]


def with_wrong(records: Sequence[Record]) -> list[Record]:
    """The records that have wrong answers to compare with."""
    return [record for record in records if record.wrong and record.prompt is not None]


def asked(records: Sequence[Record]) -> list[Record]:
    """The records that ask something."""
    return [record for record in records if record.prompt is not None]


def generated(model: Model, records: Sequence[Record], run: Run, max_new_tokens: int) -> list[str]:
    """The model's greedy answer to each record's prompt."""
    known = run.cache.setdefault(("answers", model.digest(), max_new_tokens), {})
    prompts = [record.prompt or "" for record in records]
    missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in known))
    if missing:
        known.update(zip(missing, greedy_answers(model, missing, run, max_new_tokens), strict=True))
    return [known[prompt] for prompt in prompts]


def prepare(model: Model, data: Roles, run: Run) -> None:
    """Scores all candidate answers of all audited roles in one pass, so that each question is computed once."""
    encoder = Encoder.of(model)
    sequences: list[Encoded] = []
    for role in ROLES:
        for record in data.probe(role):
            sequences.append(encoder.record(record))
            if record.prompt is not None and record.wrong:
                others = (record.paraphrase or record.answer or "", *record.wrong)
                sequences.extend(encoder.pair(record.prompt, text) for text in others)
    for role in ("holdout", "general"):
        sequences.extend(encoder.records(data.get(role, [])))
    if sequences:
        scored(model, sequences, run)
