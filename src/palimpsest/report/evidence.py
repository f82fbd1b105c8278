"""The evidence: everything one report is made from, as one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from palimpsest.audit.reading import Reading
from palimpsest.errors import PalimpsestError, nearest

FORMAT = 1
Part = Literal["before", "gold", "erased", "control"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleData:
    """What a role held: how many records, about whom, and their digest. Never the records."""

    records: int
    subjects: tuple[str, ...] = ()
    digest: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the records came from and which role each of them had."""

    source: str = ""
    roles: Mapping[str, RoleData] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Wall-clock seconds and the peak resident memory in bytes."""

    seconds: float = 0.0
    peak_bytes: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A probe that gave no reading, and why."""

    probe: str
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model generated for one prompt, beside the recorded answer."""

    role: str
    prompt: str
    reference: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """How far one part of one layer moved: norm of the change over norm of the weights before."""

    layer: str
    part: str
    relative: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """How many parameters changed, of how many, and by how much per layer."""

    changed: int = 0
    total: int = 0
    norms: tuple[LayerNorm, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEvidence:
    """One model of one seed: what was done to it, what was measured on it, what it answered."""

    name: str
    part: Part
    title: str
    method: str | None = None
    fidelity: str = ""
    deviations: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    cost: Cost = Cost()
    readings: tuple[Reading, ...] = ()
    failures: tuple[Failure, ...] = ()
    answers: tuple[Answer, ...] = ()
    weights: Weights | None = None
    ledger: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise PalimpsestError(f"model {self.name!r}: part is {self.part!r}. {nearest(self.part, get_args(Part))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that a report shows. `default` is the slug of the method that the verdict is about."""

    title: str
    models: tuple[ModelEvidence, ...]
    question: str = ""
    command: str = ""
    created: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    machine: str = ""
    seeds: tuple[int, ...] = ()
    data: Data = Data()
    default: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null, because JSON has none."""
        return _plain({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Evidence:
        """The evidence that `to_dict` wrote."""
        fields = {key: value for key, value in saved.items() if key != "format"}
        data = saved.get("data") or {}
        roles = {role: RoleData(**_tuples(given, "subjects")) for role, given in data.get("roles", {}).items()}
        fields["data"] = Data(source=data.get("source", ""), roles=roles)
        fields["models"] = tuple(_model(model) for model in saved["models"])
        return cls(**_tuples(fields, "seeds"))


def load(path: str | Path) -> Evidence:
    """The evidence in a file; a damaged file, or one of a newer format, raises."""
    path = Path(path)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = int(saved["format"])
        if found <= FORMAT:
            return Evidence.from_dict(saved)
    except FileNotFoundError:
        raise PalimpsestError(f"there is no evidence file {path}. Run an audit first.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PalimpsestError(f"{path} is damaged and cannot be read as evidence ({error}).") from None
    raise PalimpsestError(f"{path} has format {found}; this version of palimpsest reads up to {FORMAT}. Upgrade it.")


def save(evidence: Evidence, path: str | Path) -> Path:
    """The path of the written file; what was there before stays intact until the new content is on disk."""
    return write_atomically(path, json.dumps(evidence.to_dict(), ensure_ascii=False, allow_nan=False, indent=1))


def write_atomically(path: str | Path, text: str) -> Path:
    """The path of the written text file; an old file is replaced at once or not at all."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes a private file; a report is meant to be handed on like any other file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PalimpsestError(f"{path} could not be written ({error.strerror}). Nothing was changed.") from error
    return path


def _model(saved: Mapping[str, Any]) -> ModelEvidence:
    weights = saved.get("weights")
    rebuilt = {
        "cost": Cost(**(saved.get("cost") or {})),
        "readings": tuple(_reading(reading) for reading in saved.get("readings", ())),
        "failures": tuple(Failure(**failure) for failure in saved.get("failures", ())),
        "answers": tuple(Answer(**answer) for answer in saved.get("answers", ())),
        "weights": None,
    }
    if weights:
        norms = tuple(LayerNorm(**norm) for norm in weights.get("norms", ()) if norm["relative"] is not None)
        rebuilt["weights"] = Weights(**{**weights, "norms": norms})
    return ModelEvidence(**_tuples({**saved, **rebuilt}, "deviations"))


def _reading(saved: Mapping[str, Any]) -> Reading:
    values = [{**value, "value": math.nan if value["value"] is None else value["value"]} for value in saved["values"]]
    return Reading.from_dict({"caveats": (), **saved, "values": values})


def _tuples(saved: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**saved, **{name: tuple(saved.get(name) or ()) for name in names}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
