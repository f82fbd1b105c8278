"""Measured models as evidence for a report: one at a time, or a whole audit of saved models."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palimpsest import __version__
from palimpsest.audit.answers import asked, generated
from palimpsest.audit.battery import audit, probes
from palimpsest.data.records import Record, Roles, digest
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.model import Model
from palimpsest.report.evidence import (
    Answer,
    Cost,
    Data,
    Evidence,
    Failure,
    LayerNorm,
    ModelEvidence,
    Part,
    RoleData,
    Weights,
    save,
)
from palimpsest.run import Run, console
from palimpsest.statistics.change import weight_change
from palimpsest.system import Probe, catalogue

SHOWN = {"forget": 24, "retain": 8}
"""How many answers of each role a report shows."""
_ERASED: Part = "erased"
_NAMES = {"control": "second gold"}
TITLES = {
    "before": "before",
    "gold": "gold: never saw the forget set",
    "control": "second gold: another seed",
}


def measure(
    name: str,
    part: Part,
    model: Model,
    data: Roles,
    run: Run,
    battery: Sequence[Probe],
    *,
    gold: Model | None = None,
    before: Model | None = None,
    second_gold: Model | None = None,
    max_new_tokens: int = 200,
) -> ModelEvidence:
    """One model measured: readings, answers, what changed against `before`, and what its ledger says."""
    found = audit(model, data, battery, run, gold=gold, before=before, second_gold=second_gold)
    entry = model.ledger.made_by
    facts = catalogue().get(entry.method) if entry is not None else None
    return ModelEvidence(
        name=name,
        part=part,
        title=TITLES.get(part) or (facts.title if facts is not None else name),
        method=entry.method if entry is not None and part not in TITLES else None,
        fidelity=facts.fidelity if facts is not None else "",
        deviations=facts.deviations if facts is not None else (),
        settings=entry.settings if entry is not None else {},
        seed=run.seed,
        cost=Cost(seconds=entry.seconds, peak_bytes=entry.peak_bytes) if entry is not None else Cost(),
        readings=found.readings,
        failures=tuple(Failure(**failure) for failure in found.failures),
        answers=answers_shown(model, data, run, max_new_tokens),
        weights=changed(before, model) if before is not None and before is not model else None,
        ledger=dataclasses.asdict(model.ledger),
    )


def answers_shown(model: Model, data: Roles, run: Run, max_new_tokens: int) -> tuple[Answer, ...]:
    """The model's answers to the first prompts of the forget and retain sets; a classifier answers nothing."""
    if kind_of(model) == "classifier":
        return ()
    shown = []
    for role, most in SHOWN.items():
        records = asked(data.probe(role))[:most]
        for record, text in zip(records, generated(model, records, run, max_new_tokens), strict=True):
            shown.append(Answer(role=role, prompt=record.prompt or "", reference=record.answer or "", answer=text))
    return tuple(shown)


def changed(before: Model, after: Model) -> Weights | None:
    """What the report says about the difference between two models; None where they have other weights altogether."""
    shapes = [{name: w.shape for name, w in m.network.named_parameters()} for m in (before, after)]
    if shapes[0] != shapes[1]:
        return None
    change = weight_change(before.network, after.network)
    norms = tuple(
        LayerNorm(layer=layer, part=part, relative=x) for (layer, part), x in change.relative.items() if layer
    )
    return Weights(changed=change.changed, total=change.total, norms=norms)


def described(
    title: str,
    models: Sequence[ModelEvidence],
    data: Roles,
    *,
    question: str = "",
    source: str = "",
    command: str = "",
    seeds: Sequence[int] = (0,),
    default: str | None = None,
) -> Evidence:
    """The evidence of measured models with its provenance."""
    return Evidence(
        title=title,
        question=question,
        command=command,
        created=datetime.date.today().isoformat(),
        versions=versions(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        seeds=tuple(seeds),
        data=Data(source=source, roles={role: _role(records) for role, records in data.items()}),
        default=default,
        models=tuple(models),
    )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy")
    own = {"palimpsest": __version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in names}


def _role(records: Sequence[Record]) -> RoleData:
    subjects = tuple(dict.fromkeys(record.subject for record in records if record.subject))
    return RoleData(records=len(records), subjects=subjects[:50], digest=digest(records))


def audit_saved(
    models: str | Path | Sequence[str | Path],
    data: Roles,
    out: str | Path,
    run: Run | None = None,
    *,
    before: str | Path | None = None,
    gold: str | Path | None = None,
    second_gold: str | Path | None = None,
    battery: Sequence[Any] | None = None,
    max_new_tokens: int = 200,
    source: str = "",
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Measures saved models and writes `evidence.json` and `report.html` into `out`; returns the page."""
    from palimpsest.models.loading import config_of, load
    from palimpsest.report import page

    names = [str(name) for name in ([models] if isinstance(models, str | Path) else models)]
    if not any((*names, before, gold)):
        raise PalimpsestError("an audit needs a model. Name at least one.")
    run = run or Run()
    out = Path(out)
    if (out / "evidence.json").exists() and not overwrite:
        raise PalimpsestError(f"{out} already holds evidence. Choose another folder, or pass --overwrite.")
    if not any(data.probe(role) for role in ("forget", "retain")):
        raise PalimpsestError("an audit needs the role forget or retain. Pass --data with --forget-subject, or --role.")
    probes(battery)  # a wrong name shows before anything is loaded
    for given in (before, gold, second_gold, *names):
        if given is not None:
            config_of(given)
    reference = load(gold, run=run) if gold is not None else None
    original = load(before, run=run) if before is not None else None
    other = load(second_gold, run=run) if second_gold is not None else None
    measured: list[ModelEvidence] = []
    wanted: list[tuple[Part, str | Path | None]] = [("before", before), ("gold", gold), ("control", second_gold)]
    for part, name in [*wanted, *((_ERASED, model) for model in names)]:
        if name is None:
            continue
        model = {"before": original, "gold": reference, "control": other}.get(part) or load(name, run=run)
        label = _label(model, str(name), [m.name for m in measured]) if part == "erased" else _NAMES.get(part, part)
        if run.progress:
            console().print(f"measuring {label}")
        chosen = probes(battery, max_new_tokens=max_new_tokens, model=model)
        beside = {"gold": reference, "before": original, "second_gold": other}
        measured.append(measure(label, part, model, data, run, chosen, max_new_tokens=max_new_tokens, **beside))
    found = described(
        f"Audit of {', '.join(names)}",
        measured,
        data,
        question="What is left of the records that should be forgotten?",
        source=source,
        command=command,
        seeds=(run.seed,),
        default=next((m.method for m in measured if m.part == "erased"), None),
    )
    save(found, out / "evidence.json")
    return page.write(found, out / "report.html")


def _label(model: Model, path: str, taken: Sequence[str]) -> str:
    """The method that made the model, with its folder where that is taken, else its folder; numbered where both are."""
    folder = Path(path).name
    name = made_by.method if (made_by := model.ledger.made_by) is not None else folder
    if name in taken and name != folder:
        name = f"{name}, {folder}"
    number = sum(other == name or other.startswith(f"{name} ") for other in taken)
    return name if not number else f"{name} {number + 1}"
