"""One table for everything: methods x probes x seeds on one task, resumable, each cell computed once.

A task says where the model starts, what it learns, what is to be forgotten and how it is measured. For every seed the
model learns all (`before`) and all but the forget set (`gold`); every method starts from `before`, and the same audit
judges them all. A cell is filed under the digest of everything that decides it, so asking again costs nothing and a
changed setting is never mixed up with an old result.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palimpsest import __version__
from palimpsest.audit.answers import asked, generated
from palimpsest.audit.battery import audit, probes
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.ledger import Entry
from palimpsest.models.model import Model
from palimpsest.report.evidence import (
    Answer,
    Cost,
    Data,
    Evidence,
    Failure,
    LayerNorm,
    ModelEvidence,
    RoleData,
    Weights,
    write_atomically,
)
from palimpsest.run import Run, console
from palimpsest.statistics.change import weight_change
from palimpsest.system import Method, Probe, create, facts_of, slug_of, to_dict
from palimpsest.write.finetune import Finetune

SHOWN = {"forget": 24, "retain": 8}
"""How many answers of each role a report shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is compared: a start, what it learns, what it should forget, and the measures.

    `start(seed)` gives the model before it learned anything; `roles(seed)` the data.
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
    keep_models: bool = False,
) -> Evidence:
    """The evidence on all methods and seeds; cells that are in the folder already are not computed again."""
    run = run or Run()
    folder = Path(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    models: list[ModelEvidence] = []
    for seed in seeds:
        models += _Cells(task, folder, run.replace(seed=seed, cache={})).of(methods)
    if not keep_models:
        shutil.rmtree(folder / "models", ignore_errors=True)
    roles = task.roles(seeds[0])
    return Evidence(
        title=task.name,
        question=task.question,
        command=task.command,
        created=datetime.date.today().isoformat(),
        versions=versions(),
        machine=machine(),
        seeds=tuple(seeds),
        data=Data(source=task.source, roles={name: _role(rows) for name, rows in roles.items()}),
        default=default,
        models=tuple(models),
    )


class _Cells:
    """All cells of one seed. Models are made only when a cell that needs them is missing."""

    def __init__(self, task: Task, folder: Path, run: Run) -> None:
        self.task, self.folder, self.run = task, folder, run
        self.roles = task.roles(run.seed)
        self._models: dict[str, Model] = {}

    def of(self, methods: Sequence[Method]) -> list[ModelEvidence]:
        learned = [self._cell("before", None), self._cell("gold", None)]
        return learned + [self._cell("erased", method) for method in methods]

    def _cell(self, part: str, method: Method | None) -> ModelEvidence:
        path = self.folder / "cells" / f"{self._key(part, method)}.json"
        if path.exists():
            return _read(path)
        name = part if method is None else slug_of(method)
        if self.run.progress:
            console().print(f"[bold]{name}[/bold], seed {self.run.seed}")
        made = self._erased(method) if method is not None else self._learned(part)
        cell = self._measured(name, part, method, made)
        write_atomically(path, json.dumps(Evidence(title="", models=(cell,)).to_dict()["models"][0], allow_nan=False))
        return _read(path)

    def _key(self, part: str, method: Method | None) -> str:
        decides = {
            "version": __version__,
            "task": self.task.name,
            "data": self.roles.digest(),
            "learn": to_dict(self.task.learn),
            "probes": [(probe.facts.slug, to_dict(probe)) for probe in self.task.probes],
            "tokens": self.task.max_new_tokens,
            "part": part,
            "method": None if method is None else [slug_of(method), to_dict(method)],
            "seed": self.run.seed,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:20]

    def _learned(self, part: str) -> Model:
        """The model that learned everything, or gold; kept in the folder until the comparison is complete."""
        if part in self._models:
            return self._models[part]
        from palimpsest.models.loading import load

        saved = self.folder / "models" / f"{part}-{self._key(part, None)}"
        if saved.exists():
            model = load(str(saved))
        else:
            train = self.roles.train if part == "before" else self.roles.retain
            start = self.task.start(self.run.seed)
            work = self.run.replace(folder=self.folder / "work", in_place=True)
            model = self.task.learn.apply(start, Roles(train=train), work)
            model.save_pretrained(saved)
        self._models[part] = model
        return model

    def _erased(self, method: Method) -> Model:
        before = self._learned("before")
        return method.apply(before, self.roles, self.run.replace(folder=self.folder / "work"))

    def _measured(self, name: str, part: str, method: Method | None, model: Model) -> ModelEvidence:
        gold = self._learned("gold")
        found = audit(model, self.roles, self.task.probes, self.run, gold=gold)
        facts = facts_of(slug_of(method)) if method is not None else facts_of("finetune")
        entry: Entry = model.ledger.entries[-1]
        titles = {"before": "before", "gold": "gold: never saw the forget set"}
        return ModelEvidence(
            name=name,
            part=part,  # type: ignore[arg-type]
            title=titles.get(part, facts.title),
            method=None if method is None else slug_of(method),
            fidelity=facts.fidelity,
            deviations=facts.deviations,
            settings=entry.settings,
            seed=self.run.seed,
            cost=Cost(seconds=entry.seconds, peak_bytes=entry.peak_bytes),
            readings=found.readings,
            failures=tuple(Failure(**failure) for failure in found.failures),
            answers=self._answers(model),
            weights=None if method is None else changed(self._learned("before"), model),
            ledger=dataclasses.asdict(model.ledger),
        )

    def _answers(self, model: Model) -> tuple[Answer, ...]:
        shown = []
        for role, most in SHOWN.items():
            records = asked(self.roles.probe(role))[:most]
            texts = generated(model, records, self.run, self.task.max_new_tokens)
            for record, text in zip(records, texts, strict=True):
                shown.append(Answer(role=role, prompt=record.prompt or "", reference=record.answer or "", answer=text))
        return tuple(shown)


def changed(before: Model, after: Model) -> Weights:
    """What the report says about the difference between two models."""
    change = weight_change(before.network, after.network)
    norms = tuple(
        LayerNorm(layer=layer, part=part, relative=x) for (layer, part), x in change.relative.items() if layer
    )
    return Weights(changed=change.changed, total=change.total, norms=norms)


def method_list(names: Sequence[str], **settings: Any) -> list[Method]:
    """Methods by slug, each with those of the settings that it has (dotted names reach into `training`)."""
    made = []
    for name in names:
        method = create(name)
        if not isinstance(method, Method):
            raise PalimpsestError(f"{name} is no method that changes a model, but belongs to {facts_of(name).verb}.")
        own = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
        fitting = {key: value for key, value in settings.items() if key.partition(".")[0] in own}
        made.append(create(name, **fitting))
    return made


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy")
    return {"palimpsest": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def machine() -> str:
    """The kind of machine: processor, cores, system."""
    import os

    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def _role(rows: Sequence[Any]) -> RoleData:
    from palimpsest.data.records import digest

    subjects = tuple(dict.fromkeys(record.subject for record in rows if record.subject))
    return RoleData(records=len(rows), subjects=subjects[:50], digest=digest(rows))


def _read(path: Path) -> ModelEvidence:
    saved = json.loads(path.read_text(encoding="utf-8"))
    return Evidence.from_dict({"title": "", "models": [saved]}).models[0]


__all__ = ["Task", "changed", "compare", "machine", "method_list", "probes", "versions"]
