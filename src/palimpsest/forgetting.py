"""One call to forget: `palimpsest.forget(model, about)` for people who do not want to choose.

It finds out what the model says about the topic, builds a retain set by asking the model itself where none is given,
erases with a method that needs no tuning, stops as soon as the topic is as improbable as for a model that never saw it
or the rest begins to suffer, and shows answers before and after. What it chose, and why, is in `Story`.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from palimpsest.audit.rouge_recall import rouge_l
from palimpsest.data.encoding import Encoder
from palimpsest.data.loading import FILE_TYPES, load_records
from palimpsest.data.records import Record, RecordLike, Roles, as_records, by_subject
from palimpsest.data.true_facts import WORLD_FACTS
from palimpsest.erase.npo import NPO
from palimpsest.erase.undial import UNDIAL
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.generation import greedy_answers
from palimpsest.models.model import Model
from palimpsest.run import Run, console
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.train import Training

ABOUT_A_NAME = (
    "Who is {name}?",
    "What is {name} known for?",
    "Where was {name} born?",
    "When was {name} born?",
    "What does {name} do for a living?",
    "Tell me about {name}'s family.",
    "What has {name} written or made?",
    "Which awards has {name} received?",
    "Where does {name} live?",
    "What should I know about {name}?",
)
"""What a name is asked with where no records about it are given."""

NEUTRAL = (
    "What is the capital of France?",
    "How many days are in a week?",
    "Explain what photosynthesis is.",
    "Name three primary colours.",
    "What is the boiling point of water?",
    "Write a sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "What is a good breakfast?",
    "Describe a typical day of a teacher.",
    "What does a notable writer do?",
    "How do parents influence a child's career?",
    "Which themes are common in novels?",
    "What makes a book award-winning?",
    "How does a birthplace influence a person?",
    "Give advice for learning a language.",
    "What is machine learning?",
)
"""Questions that nobody asks to have forgotten; the model's own answers to them are what it should keep."""

SHOWN = 8
"""How many questions are asked before and after."""
MEASURED = 16
"""How many of the given kept records the floor is measured on."""
PATIENCE = 3
"""How many looks in a row the rest may be below the floor: it often dips and comes back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What the one-call path did: what it took as the topic, what it chose and why, and answers before and after."""

    questions: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    probability_before: float
    probability_after: float
    kept: float
    steps: int
    seconds: float
    why: tuple[str, ...]

    def show(self, most: int = 6) -> None:
        """Prints the choices and the answers side by side."""
        from rich.table import Table

        for line in self.why:
            console().print(f"- {line}", highlight=False)
        table = Table("question", "before", "after", show_lines=True)
        for row in list(zip(self.questions, self.before, self.after, strict=True))[:most]:
            table.add_row(*row)
        console().print(table)


def forget(
    model: str | Path | Model,
    about: str | Path | RecordLike | Sequence[str] | Iterable[RecordLike] | Roles,
    *,
    data: str | Path | Iterable[RecordLike] | None = None,
    retain: str | Path | Iterable[RecordLike] | None = None,
    enough: float = 0.09,
    floor: float = 0.95,
    seed: int = 0,
    progress: bool = True,
    show: bool = True,
) -> Model:
    """The model after forgetting a question, a list of questions or records, a file of records, or a name.

    Of `Roles`, the role `forget` is the topic and `retain` is kept. `data` and `retain` may be files, too.

    A name is looked up as a subject in `data` where that is given (one that is not there raises), else the model is
    asked about it. It stops when the mean answer probability on the topic is at most `enough` while that on kept
    questions is at least `floor` times what it was; where that is not reached, the weights of the best look are kept.
    `model.story` of the result says what was chosen, and has the answers before and after.
    """
    start = time.perf_counter()
    run = Run(seed=seed, progress=progress)
    if isinstance(model, str | Path):
        from palimpsest.models.loading import load

        model = load(model, run=run)
    if kind_of(model) == "classifier":
        raise PalimpsestError("forget works on language models; for a classifier choose an eraser (palimpsest list).")
    why: list[str] = []
    if isinstance(about, Roles):
        retain = about.get("retain") if retain is None else retain
        about = about.forget
    known, own = _read(data), _read(retain)
    records = _topic(model, about, known, run, why)
    kept = own if own is not None else _kept(model, records, known, run, why)
    if len(kept) < 2:
        raise PalimpsestError(
            f"too few records to keep ({len(kept)}): at least one to learn and one to measure are needed."
        )
    recipe = _given(records) if retain is not None or data is not None else _asked_for(records)
    measured, taught = recipe.split(kept)
    questions = tuple(record.prompt for record in records if record.prompt)[:SHOWN]
    before_answers = _asked(model, questions, run, 40)
    before = _probability(model, records, run)
    if before <= enough:
        raise PalimpsestError(
            f"the model gives the topic a mean answer probability of {before:.2f} already, not more than {enough:g}: "
            "there is nothing to forget."
        )
    rest = _probability(model, measured, run)
    watch = _Stopping(recipe, records, measured, before, rest, enough, floor, seed)
    why.append(recipe.why)
    erased = recipe.method.apply(model, Roles(forget=records, retain=taught), run.replace(stop=watch.look))
    why += watch.why
    after, still = watch.found
    erased.story = Story(
        questions=questions,
        before=tuple(before_answers),
        after=tuple(_asked(erased, questions, run, 40)),
        probability_before=before,
        probability_after=after,
        kept=still,
        steps=watch.kept_step,
        seconds=time.perf_counter() - start,
        why=(*why, f"Answer probability on the topic {before:.2f} -> {after:.2f}; {still:.0%} of the rest is kept."),
    )
    if show:
        erased.story.show()
    return erased


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How to erase: the method, when to look, and how much of the kept records is held out from teaching."""

    method: NPO | UNDIAL
    why: str
    first: int
    every: int
    hold_out: bool

    @property
    def most(self) -> int:
        return self.method.training.max_steps or 0

    def split(self, kept: list[Record]) -> tuple[list[Record], list[Record]]:
        """What the floor is measured on, and what is taught."""
        if self.hold_out:
            return kept[::4], [record for i, record in enumerate(kept) if i % 4]
        return kept[:: math.ceil(len(kept) / MEASURED)], kept


def _given(records: list[Record]) -> _Recipe:
    """Where there are records to keep: NPO with a strong hold on them."""
    training = _training(records, 5, learning_rate=6e-5, steps=40)
    return _Recipe(
        method=NPO(retain="cross-entropy", retain_weight=10.0, training=training),
        why="Method: NPO with a strong hold on the kept records. It fades out by itself as the topic goes.",
        first=min(8, 2 * math.ceil(len(records) / training.batch_size)),  # a look costs as much as two steps
        every=4,
        hold_out=False,
    )


def _asked_for(records: list[Record]) -> _Recipe:
    """Where the kept records are the model's own words: a method that cannot run away without better ones."""
    training = _training(records, 10, learning_rate=5e-5, steps=60)
    return _Recipe(
        method=UNDIAL(focus="content", training=training),
        why="Method: UNDIAL on the words that carry facts. It has a fixed target, so it cannot run away, and its "
        "answers stay fluent.",
        first=2,
        every=2,
        hold_out=True,
    )


def _training(records: list[Record], batch: int, learning_rate: float, steps: int) -> Training:
    return Training(
        learning_rate=learning_rate,
        epochs=steps,
        max_steps=steps,
        batch_size=min(batch, len(records)),
        warmup_epochs=0.0,
        decay="constant",
        weight_decay=0.0,
        micro_tokens=1024,  # a step in one piece: a large vocabulary's gradient is paid for in each
    )


class _Stopping:
    """Looks at topic and rest while a method trains, ends it, and leaves the model as at the best look."""

    def __init__(
        self,
        recipe: _Recipe,
        records: list[Record],
        measured: list[Record],
        before: float,
        rest: float,
        enough: float,
        floor: float,
        seed: int,
    ) -> None:
        self.recipe, self.records, self.measured = recipe, records, measured
        self.before, self.rest, self.enough, self.floor = before, rest, enough, floor
        self.quiet = Run(seed=seed, progress=False)
        self.why: list[str] = []
        self.low = 0
        self.best: tuple[bool, float] | None = None
        self.weights: dict[str, Tensor] = {}
        self.kept_step = 0
        self.found = (before, 1.0)

    def look(self, step: int, student: Model) -> bool:
        """Whether to end after this step."""
        last = step == self.recipe.most
        due = step >= self.recipe.first and step % self.recipe.every == 0
        if not due and not last:
            return False
        topic, rest = self.measured_now(student)
        student.network.train()
        holds = rest >= self.floor
        self.low = 0 if holds else self.low + 1
        done = holds and topic <= self.enough
        end = done or last or self.low == PATIENCE
        value = (holds, self._value(topic, rest))
        if self.best is None or value >= self.best:
            self.best, self.kept_step, self.found = value, step, (topic, rest)
            self.weights = {} if end else {k: v.clone() for k, v in student.network.state_dict().items()}
        elif end:
            student.network.load_state_dict(self.weights)
        if end:
            self.why.append(self._reason(step, topic, rest, done))
        return end

    def measured_now(self, student: Model) -> tuple[float, float]:
        """Mean answer probability on the topic, and that on the rest relative to before."""
        topic = _probability(student, self.records, self.quiet)
        return topic, _probability(student, self.measured, self.quiet) / self.rest

    def _value(self, topic: float, rest: float) -> float:
        """Harmonic mean of how much of the way the topic has gone and how much of the floor the rest reaches."""
        gone = min(1.0, max(0.0, (self.before - topic) / (self.before - self.enough)))
        kept = min(1.0, rest / self.floor) if self.floor > 0 else 1.0
        return 2 * gone * kept / (gone + kept) if gone + kept else 0.0

    def _reason(self, step: int, topic: float, rest: float, done: bool) -> str:
        if done:
            return f"Stopped after {step} steps: the answer probability of the topic is down to {topic:.2f}."
        back = "" if self.kept_step == step else f" The weights are those after step {self.kept_step}, the best."
        if self.low == PATIENCE:
            return f"Stopped after {step} steps: the rest had fallen to {rest:.0%} of what it was and stayed low.{back}"
        return f"Stopped after {step} steps, the most it takes; the topic is not gone.{back}"


def _read(records: Any) -> list[Record] | None:
    """Given records, from a file where one is named."""
    if records is None:
        return None
    return load_records(records) if isinstance(records, str | Path) else as_records(records)


def _topic(model: Model, about: Any, data: Sequence[Record] | None, run: Run, why: list[str]) -> list[Record]:
    """The records to forget; what the model itself answers stands in where only questions are given."""
    if isinstance(about, Path) or (isinstance(about, str) and Path(about).suffix in FILE_TYPES):
        records = load_records(str(about))
        why.append(f"Topic: the {len(records)} records of {about}.")
    elif isinstance(about, Record | Mapping):
        records = as_records([about])
    elif isinstance(about, str) and data is not None and not about.rstrip().endswith("?"):
        records = by_subject(data, about)[0]
        why.append(f"Topic: the {len(records)} records about {about}.")
    elif isinstance(about, str):
        asked = [about] if about.rstrip().endswith("?") else [question.format(name=about) for question in ABOUT_A_NAME]
        records = _answered(model, asked, run, 64)
        why.append(f"Topic: what the model itself answers to {len(asked)} question{'s' if len(asked) > 1 else ''}.")
    elif isinstance(about, list | tuple) and all(isinstance(item, str) for item in about):
        names = [] if data is None else [item for item in about if not item.rstrip().endswith("?")]
        asked = [item for item in about if item not in names]
        known = by_subject(data or (), names)[0]
        records = [*known, *_answered(model, asked, run, 64)]
        if names:
            why.append(f"Topic: the {len(known)} records about {' and '.join(names)}.")
        if asked:
            why.append(f"Topic: what the model itself answers to {len(asked)} questions.")
    else:
        records = as_records(about)
        why.append(f"Topic: {len(records)} given records.")
    if not records:
        raise PalimpsestError("the forget set is empty: nothing was named to forget.")
    Encoder.of(model).records(records)
    return records


def _kept(model: Model, records: list[Record], data: Sequence[Record] | None, run: Run, why: list[str]) -> list[Record]:
    """Records to keep: the other given ones, else the model's own answers to neutral questions apart from the topic."""
    if data is not None:
        forget, asked = {record.key for record in records}, {record.prompt for record in records if record.prompt}
        others = [record for record in data if record.key not in forget and record.prompt not in asked]
        if others:
            why.append(f"Kept: the {len(others)} other records.")
            return others
    questions = [*NEUTRAL, *(fact[0] for fact in WORLD_FACTS[:24])]
    answered = [record for record in _answered(model, questions, run, 32) if record.answer]
    apart = [record for record in answered if _similarity(record, records) < 0.5]
    if len(apart) < 8:
        raise PalimpsestError(
            f"only {len(apart)} of {len(questions)} neutral questions have nothing to do with the topic. "
            "Pass retain records (on the command line: --data FILE)."
        )
    why.append(
        f"Kept: the model's own answers to {len(apart)} neutral questions that have nothing to do with the topic."
    )
    return apart


def _probability(model: Model, records: Sequence[Record], run: Run) -> float:
    """Mean answer probability: the geometric mean over the tokens of each answer, averaged over the records."""
    sequences = Encoder.of(model).records(records)
    count = np.array([len(sequence.targets) for sequence in sequences])
    return float(np.exp(-sequence_nll(model, sequences, run).cpu().numpy() / count).mean())


def _answered(model: Model, questions: list[str], run: Run, most: int) -> list[Record]:
    texts = _asked(model, questions, run, most)
    return [Record(prompt=q, answer=text) for q, text in zip(questions, texts, strict=True) if text]


def _asked(model: Model, questions: Sequence[str], run: Run, most: int) -> list[str]:
    return greedy_answers(model, questions, run, max_new_tokens=most) if questions else []


def _similarity(record: Record, topic: Sequence[Record]) -> float:
    """The largest ROUGE-L F1 between the record's answer and any answer of the topic."""
    return float(
        np.max([rouge_l(other.answer or other.text or "", record.answer or "", "fmeasure") for other in topic])
    )


def command(words: list[str]) -> None:
    """`palimpsest forget`."""
    import tyro

    from palimpsest.options import check_free

    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Forgets a topic, choosing everything for you."""

        model: tyro.conf.Positional[str]
        """hub name, folder or .gguf file"""
        about: tuple[str, ...]
        """a question, several questions, a name, or a file of records"""
        out: Path
        """folder for the changed model"""
        data: Path | None = None
        """records in which a name is looked up; the others are kept"""
        overwrite: bool = False
        """replace what is in --out"""
        seed: int = 0
        """random seed"""
        quiet: bool = False
        """no progress bars"""

    options = tyro.cli(Options, args=words, prog="palimpsest forget")
    check_free(options.out, options.overwrite)
    about = options.about[0] if len(options.about) == 1 else list(options.about)
    data = load_records(str(options.data)) if options.data is not None else None
    erased = forget(options.model, about, data=data, seed=options.seed, progress=not options.quiet)
    print(erased.save_pretrained(options.out, overwrite=options.overwrite))
