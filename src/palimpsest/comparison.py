"""One table for everything: methods x probes x seeds on one task, resumable, each cell computed once.

A task says where the model starts, what it learns, what is to be forgotten and how it is measured. For every seed the
model learns all (`before`) and all but the forget set (`gold`); every method starts from `before`, and the same audit
judges them all. A cell is filed under the digest of everything that decides it, so asking again costs nothing and a
changed setting is never mixed up with an old result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palimpsest import __version__
from palimpsest.audit.session import described, measure
from palimpsest.data.records import Roles
from palimpsest.models.model import Model
from palimpsest.report.evidence import Evidence, ModelEvidence, Part, write_atomically
from palimpsest.run import Run, console
from palimpsest.system import Method, Probe, slug_of, to_dict
from palimpsest.write.finetune import Finetune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is compared: a start, what it learns, what it should forget, and the measures.

    `start(seed)` gives the model before it learned anything; `roles(seed)` the data. Cells are filed under `name` and
    not under what `start` gives, so a task with another start needs another name.
    """

    name: str
    question: str
    source: str
    start: Callable[[int], Model]
    roles: Callable[[int], Roles]
    learn: Finetune
    probes: tuple[Probe, ...]
    max_new_tokens: int
    command: str = ""


def compare(
    task: Task,
    methods: Sequence[Method],
    folder: Path,
    *,
    seeds: Sequence[int] = (0,),
    run: Run | None = None,
    default: str | None = None,
    keep_models: bool = True,
) -> Evidence:
    """The evidence on all methods and seeds; cells that are in the folder already are not computed again.

    The models that learned stay in `folder/models`, so that another method or probe need not learn them again, unless
    `keep_models` is false.
    """
    run = run or Run()
    folder = Path(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    models: list[ModelEvidence] = []
    clock = _Clock(sum(_Cells(task, folder, run.replace(seed=seed)).missing(methods) for seed in seeds))
    for seed in seeds:
        models += _Cells(task, folder, run.replace(seed=seed, cache={}), clock).of(methods)
    if not keep_models:
        shutil.rmtree(folder / "models", ignore_errors=True)
    return described(
        task.name,
        models,
        task.roles(seeds[0]),
        question=task.question,
        source=task.source,
        command=task.command,
        seeds=seeds,
        default=default,
    )


class _Clock:
    """Which of the cells that are to be computed comes next, and how long the rest may take."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.start = total, 0, time.monotonic()

    def next(self) -> str:
        """`3 of 40, about 12 min left`, as the cells before it went."""
        done, self.begun = self.begun, self.begun + 1
        minutes = (time.monotonic() - self.start) / max(done, 1) * (self.total - done) / 60
        return f"{self.begun} of {self.total}" + (f", about {minutes:.0f} min left" if done else "")


class _Cells:
    """All cells of one seed. Models are made only when a cell that needs them is missing."""

    def __init__(self, task: Task, folder: Path, run: Run, clock: _Clock | None = None) -> None:
        self.task, self.folder, self.run, self.clock = task, folder, run, clock
        self.roles = task.roles(run.seed)
        self._models: dict[str, Model] = {}

    def of(self, methods: Sequence[Method]) -> list[ModelEvidence]:
        return [self._cell(part, method) for part, method in _wanted(methods)]

    def missing(self, methods: Sequence[Method]) -> int:
        """How many cells are to be computed."""
        return len({path for each in _wanted(methods) if not (path := self._path(*each)).exists()})

    def _path(self, part: Part, method: Method | None) -> Path:
        return self.folder / "cells" / f"{self._key(part, method)}.json"

    def _cell(self, part: Part, method: Method | None) -> ModelEvidence:
        path = self._path(part, method)
        if path.exists():
            return _read(path)
        name = part if method is None else slug_of(method)
        if self.run.progress and self.clock is not None:
            console().print(f"[bold]{name}[/bold], seed {self.run.seed} ({self.clock.next()})", highlight=False)
        made = self._erased(method) if method is not None else self._learned(part)
        cell = self._measured(name, part, made)
        write_atomically(path, json.dumps(Evidence(title="", models=(cell,)).to_dict()["models"][0], allow_nan=False))
        return _read(path)

    def _key(self, part: Part, method: Method | None) -> str:
        """What a measured model is filed under."""
        measures = [(probe.facts.slug, to_dict(probe)) for probe in self.task.probes]
        changes = None if method is None else [slug_of(method), to_dict(method)]
        return _digest([self._origin(part), self.roles.digest(), measures, self.task.max_new_tokens, changes])

    def _origin(self, part: Part) -> list[Any]:
        """What decides a model that learned, whatever is measured on it."""
        learned = {role: digest for role, digest in self.roles.digest().items() if role in ("train", "forget")}
        return [__version__, self.task.name, learned, to_dict(self.task.learn), part, self.run.seed]

    def _learned(self, part: Part) -> Model:
        """The model that learned everything, or gold; kept in the folder."""
        if part in self._models:
            return self._models[part]
        from palimpsest.models.loading import load

        saved = self.folder / "models" / f"{part}-{_digest(self._origin(part))}"
        if saved.exists():
            model = load(str(saved), run=self.run)
        else:
            forget = {record.key for record in self.roles.forget}
            everything = self.roles.train
            train = everything if part == "before" else [record for record in everything if record.key not in forget]
            start = self.task.start(self.run.seed)
            work = self.run.replace(folder=self.folder / "work", in_place=True)
            model = self.task.learn.apply(start, Roles(train=train), work)
            if not saved.exists():  # another process may have been quicker
                model.save_pretrained(saved)
        self._models[part] = model
        return model

    def _erased(self, method: Method) -> Model:
        before = self._learned("before")
        return method.apply(before, self.roles, self.run.replace(folder=self.folder / "work", in_place=False))

    def _measured(self, name: str, part: Part, model: Model) -> ModelEvidence:
        return measure(
            name,
            part,
            model,
            self.roles,
            self.run,
            self.task.probes,
            gold=self._learned("gold"),
            before=self._learned("before") if part == "erased" else None,
            max_new_tokens=self.task.max_new_tokens,
        )


def _wanted(methods: Sequence[Method]) -> list[tuple[Part, Method | None]]:
    return [("before", None), ("gold", None), *(("erased", method) for method in methods)]


def _digest(decides: Any) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _read(path: Path) -> ModelEvidence:
    saved = json.loads(path.read_text(encoding="utf-8"))
    return Evidence.from_dict({"title": "", "models": [saved]}).models[0]
