"""What a system is: a Method, Probe, Layer or Store, its hyperparameters, and the record of facts about it.

A system is a class under the decorator `system`, alone in its file. Nothing else has to be edited: the catalogue reads
the decorators from the source without importing it, so listing never imports torch. Packages of third parties
announce theirs through the entry-point group `palimpsest.systems` (name = slug, value = `module:Class`).
"""

from __future__ import annotations

import abc
import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from palimpsest.errors import PalimpsestError, nearest

if TYPE_CHECKING:
    from palimpsest.audit.reading import Reading
    from palimpsest.data.records import Record, Roles
    from palimpsest.models.model import Model
    from palimpsest.recall.memories import Change, Forgotten, Hit
    from palimpsest.run import Run

VERBS = ("write", "keep", "erase", "audit", "fit", "recall")
Kind = Literal["causal-lm", "mixture-of-experts", "classifier", "causal-lm or classifier", "none"]
ENTRY_POINTS = "palimpsest.systems"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about a system without running it; listings, pages, labels and checks are made from this.

    `beside` names the models besides gold that a probe's `measure` takes where an audit has them: `before` and
    `second_gold`, another model that never saw the forget set.
    """

    slug: str
    verb: str
    title: str
    paper: str
    takes: Kind = "causal-lm"
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    fidelity: str
    deviations: tuple[str, ...] = ()
    preset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: str = ""
    qualname: str = ""


class Method(abc.ABC):
    """Changes a model. Subclasses are frozen dataclasses whose fields are the hyperparameters."""

    facts: ClassVar[Facts]

    @abc.abstractmethod
    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The changed model; the one that was given stays as it was unless `run.in_place`."""


class Probe(abc.ABC):
    """Measures a model. Probes that compare with a model that never saw the forget set take it as `gold`."""

    facts: ClassVar[Facts]

    @abc.abstractmethod
    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """Named values with their intervals, and the per-example arrays behind them."""


class Store(abc.ABC):
    """Remembers conversations outside a model."""

    facts: ClassVar[Facts]

    @abc.abstractmethod
    def add(self, record: Record) -> str:
        """The identity under which the record was stored, durable once returned."""

    @abc.abstractmethod
    def search(self, query: str, limit: int = 10) -> Sequence[Hit]:
        """The stored records nearest to the query, best first, each with its identity and score."""

    @abc.abstractmethod
    def update(self, identity: str, record: Record) -> None:
        """Replaces a stored record, keeping the change in the history."""

    @abc.abstractmethod
    def forget(self, identity: str) -> Forgotten:
        """Deletes a record so that none of its bytes are left; says what went."""

    @abc.abstractmethod
    def history(self) -> Sequence[Change]:
        """Every change, oldest first."""


def setting(
    default: Any,
    *,
    help: str,
    origin: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A hyperparameter: its default, what it means, where the default comes from, and its range."""
    limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata = {"help": help, "origin": origin, "limits": {name: x for name, x in limits.items() if x is not None}}
    return dataclasses.field(default=default, metadata=metadata)


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "above": lambda value, limit: value > limit,
    "at least": lambda value, limit: value >= limit,
    "below": lambda value, limit: value < limit,
    "at most": lambda value, limit: value <= limit,
}


def check_settings(settings: Any) -> None:
    """Raises where a field of the dataclass instance is of another type, not among its choices, or out of range."""
    cls: Any = type(settings)
    hints = _hints(cls)
    name = settings.facts.slug if isinstance(settings, (Method, Probe, Store)) else type(settings).__name__
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        if choices and value not in choices:
            raise PalimpsestError(f"{name}: {field.name} is {value!r}. {nearest(str(value), map(str, choices))}")
        if kinds := _kinds(hints[field.name]):
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                expected = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
                raise PalimpsestError(f"{name}: {field.name} is {value!r}, expected {expected}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise PalimpsestError(f"{name}: {field.name} is {value}, expected a finite number.")
        for bound, limit in field.metadata.get("limits", {}).items():
            if value is not None and not _HOLDS[bound](value, limit):
                raise PalimpsestError(f"{name}: {field.name} is {value!r}, expected {bound} {limit:g}.")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _kinds(hint: Any) -> tuple[type, ...]:
    """The classes that a value of this hint may have; none where the hint says more than classes."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not all(isinstance(part, type) for part in parts):
        return ()
    return (*parts, int) if float in parts and int not in parts else tuple(parts)


T = TypeVar("T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting, dataclasses.field))
def settings(cls: T) -> T:
    """Makes a frozen, keyword-only dataclass whose fields are checked against their `setting` when it is made."""
    own = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):  # a tuple that came back from JSON
                object.__setattr__(self, field.name, tuple(value))
        check_settings(self)
        if own is not None:
            own(self)

    setattr(cls, "__post_init__", __post_init__)  # noqa: B010
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    return made


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting, dataclasses.field))
def system(slug: str, **facts: Any) -> Callable[[T], T]:
    """Registers a class as the system `slug`; the keywords are the fields of `Facts`, written as literals.

    The class becomes a dataclass of checked settings. A method's `apply` gains what holds for every method: the data
    and the model are checked first, the seed is set, and the ledger of the result says what was done.
    """

    def register(cls: T) -> T:
        declared = _facts(slug, facts, module=cls.__module__, qualname=cls.__qualname__)
        setattr(cls, "facts", declared)  # noqa: B010
        if issubclass(cls, Method):
            from palimpsest.guard import guarded_apply

            setattr(cls, "apply", guarded_apply(cls.apply))  # noqa: B010
        if issubclass(cls, Probe):
            from palimpsest.guard import guarded_measure

            setattr(cls, "measure", guarded_measure(cls.measure))  # noqa: B010
        return settings(cls)

    return register


def configuration(
    slug: str,
    *,
    title: str,
    paper: str = "",
    preset: Mapping[str, Any],
    deviations: tuple[str, ...] | None = None,
) -> Callable[[T], T]:
    """Names a setting of switches of the system below it: same code, its own slug, `preset` fields fixed."""

    def register(cls: T) -> T:
        own = cls.__dict__.get("configurations", {})
        base: Facts = cls.facts  # type: ignore[attr-defined]
        differs = base.deviations if deviations is None else deviations
        named = dataclasses.replace(
            base, slug=slug, title=title, paper=paper or base.paper, preset=dict(preset), deviations=differs
        )
        setattr(cls, "configurations", {**own, slug: named})  # noqa: B010
        return cls

    return register


def _facts(slug: str, keywords: Mapping[str, Any], *, module: str, qualname: str) -> Facts:
    unknown = set(keywords) - {field.name for field in dataclasses.fields(Facts)}
    if unknown:
        raise PalimpsestError(f"system {slug}: unknown fact {sorted(unknown)[0]!r}.")
    if not keywords.get("fidelity"):
        raise PalimpsestError(f"system {slug}: fidelity is not stated. Say how closely it follows its source.")
    if keywords.get("verb") not in VERBS:
        raise PalimpsestError(f"system {slug}: verb is {keywords.get('verb')!r}. Known: {', '.join(VERBS)}.")
    sets = {name: frozenset(keywords.get(name, ())) for name in ("needs", "uses", "beside")}
    return Facts(slug=slug, module=module, qualname=qualname, **{**keywords, **sets})


# --- the catalogue ---------------------------------------------------------------------------------------------------


@functools.cache
def catalogue() -> dict[str, Facts]:
    """Every system by slug, built-in and third-party, read from source without importing it."""
    root = Path(__file__).parent
    found: dict[str, Facts] = {}
    for verb in VERBS:
        for path in sorted((root / verb).glob("*.py")):
            found.update(_read_source(path, f"palimpsest.{verb}.{path.stem}"))
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        module = entry.value.partition(":")[0]
        whose = f" of the package {entry.dist.name}" if entry.dist is not None else ""
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise PalimpsestError(
                f"the entry point {entry.name!r}{whose} names the module {module!r}, which is not installed."
            )
        for slug, facts in _read_source(Path(spec.origin), module).items():
            if slug in found:
                raise PalimpsestError(f"two systems are called {slug!r}: {found[slug].module} and {module}{whose}.")
            found[slug] = facts
    return dict(sorted(found.items()))


def _read_source(path: Path, module: str) -> dict[str, Facts]:
    found = {}
    text = path.read_text(encoding="utf-8")
    if "@system(" not in text:
        return {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        calls = [call for call in node.decorator_list if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
        for call in reversed(calls):
            assert isinstance(call.func, ast.Name)
            keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
            if call.func.id == "system":
                base = _facts(ast.literal_eval(call.args[0]), keywords, module=module, qualname=node.name)
                found[base.slug] = base
            elif call.func.id == "configuration":
                slug = ast.literal_eval(call.args[0])
                keywords["paper"] = keywords.get("paper") or base.paper
                found[slug] = dataclasses.replace(base, slug=slug, **keywords)
    return found


def facts_of(slug: str) -> Facts:
    """The facts of a system; an unknown slug raises with the nearest known ones."""
    known = catalogue()
    if slug not in known:
        raise PalimpsestError(f"there is no system {slug!r}. {nearest(slug, known)}")
    return known[slug]


def system_class(slug: str) -> type:
    """The class behind a slug, imported now."""
    facts = facts_of(slug)
    return getattr(importlib.import_module(facts.module), facts.qualname)


def create(slug: str, **fields: Any) -> Any:
    """An instance of the system with these hyperparameters; an unknown field raises with the nearest known ones.

    A dotted name reaches into a nested dataclass: `create("npo", **{"training.epochs": 5})`.
    """
    cls = system_class(slug)
    return replace(cls(**facts_of(slug).preset), slug, fields)


def replace(settings: Any, name: str, fields: Mapping[str, Any]) -> Any:
    """A copy of a (nested) settings dataclass with some fields changed; unknown fields raise."""
    known = {field.name for field in dataclasses.fields(settings)}
    changes: dict[str, Any] = {}
    for key, value in fields.items():
        head, _, rest = key.partition(".")
        if head not in known:
            raise PalimpsestError(f"{name} has no field {key!r}. {nearest(head, known)}")
        if rest or isinstance(value, Mapping):
            inner = changes.get(head, getattr(settings, head))
            value = replace(_filled(inner, settings, head, name), f"{name}.{head}", {rest: value} if rest else value)
        changes[head] = value
    return dataclasses.replace(settings, **changes)


def _filled(inner: Any, settings: Any, field: str, name: str) -> Any:
    """The nested settings, made with their defaults where the field is None; raises where it has no fields."""
    if dataclasses.is_dataclass(inner):
        return inner
    cls: Any = type(settings)
    nested = [kind for kind in _kinds(_hints(cls)[field]) if dataclasses.is_dataclass(kind)]
    if not nested:
        raise PalimpsestError(f"{name}.{field} is a single value; it has no fields of its own.")
    return nested[0]()


def slug_of(instance: Any) -> str:
    """The slug of an instance: a configuration's where the instance has exactly its preset, else its system's."""
    for slug, facts in getattr(type(instance), "configurations", {}).items():
        if all(getattr(instance, name) == value for name, value in facts.preset.items()):
            return slug
    return instance.facts.slug


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain JSON values: nested dataclasses as dictionaries, tuples as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(settings))
