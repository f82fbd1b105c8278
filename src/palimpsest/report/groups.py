"""Models gathered over their seeds, and cast into the parts of a comparison."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from palimpsest.audit.reading import Better, Value
from palimpsest.report.evidence import Cost, Evidence, ModelEvidence
from palimpsest.report.metrics import metric

ENOUGH_SEEDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A value over all seeds. `over` says what the interval is over: `seeds`, `examples`, or nothing."""

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    better: Better = "none"
    seeds: int = 1
    over: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """One model of the comparison with all its seeds, which share name, part, method and title."""

    name: str
    part: str
    method: str | None
    title: str
    members: tuple[ModelEvidence, ...]

    @property
    def first(self) -> ModelEvidence:
        """The member of the first seed: answers and weights are shown from it."""
        return self.members[0]

    def names(self) -> tuple[str, ...]:
        """The names of all values that were measured, in order of appearance."""
        found = (value.name for member in self.members for reading in member.readings for value in reading.values)
        return tuple(dict.fromkeys(found))

    def get(self, name: str) -> Measured | None:
        """The value over all seeds; None where no seed has a finite one."""
        found = [
            value
            for member in self.members
            for reading in member.readings
            for value in reading.values
            if value.name == name and math.isfinite(value.value)
        ]
        return pooled(found) if found else None

    def number(self, name: str) -> float | None:
        """The bare value over all seeds; None where there is none."""
        measured = self.get(name)
        return None if measured is None else measured.value

    def arrays(self, name: str, probe: str | None = None, *, gaps: bool = False) -> list[np.ndarray]:
        """The array of that name of every seed that has one, without the entries that are not finite, unless `gaps`."""
        found = []
        for member in self.members:
            for reading in member.readings:
                if name in reading.arrays and probe in (None, reading.probe):
                    array = np.array([np.nan if x is None else x for x in reading.arrays[name]], dtype=float)
                    found.append(array if gaps else array[np.isfinite(array)])
        return [array for array in found if np.isfinite(array).any()]

    def cost(self) -> Cost:
        """Mean seconds and the largest peak over seeds."""
        costs = [member.cost for member in self.members]
        return Cost(
            seconds=float(np.mean([cost.seconds for cost in costs])), peak_bytes=max(cost.peak_bytes for cost in costs)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Who plays which part. `after` is the erased model that the verdict is about."""

    before: Group | None
    after: Group | None
    gold: Group | None
    erased: tuple[Group, ...] = ()
    controls: tuple[Group, ...] = ()

    def all(self) -> tuple[Group, ...]:
        """Every model in reading order: before, the judged one, the other erased ones, controls, gold."""
        order = (self.before, self.after, *(g for g in self.erased if g is not self.after), *self.controls, self.gold)
        return tuple(group for group in order if group is not None)


def compare(evidence: Evidence) -> Comparison:
    """The models of the evidence by part; without a `default`, the first erased model is judged."""
    by_name: dict[str, list[ModelEvidence]] = {}
    for model in evidence.models:
        by_name.setdefault(model.name, []).append(model)
    titles = [found[0].title for found in by_name.values()]
    groups = [
        Group(
            name=name,
            part=found[0].part,
            method=found[0].method,
            title=found[0].title if titles.count(found[0].title) == 1 else f"{found[0].title} ({name})",
            members=tuple(found),
        )
        for name, found in by_name.items()
    ]
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(group.part, []).append(group)
    erased = parts.get("erased", [])
    chosen = [group for group in erased if evidence.default in (group.method, group.name)]
    return Comparison(
        before=next(iter(parts.get("before", [])), None),
        after=next(iter(chosen or erased), None),
        gold=next(iter(parts.get("gold", [])), None),
        erased=tuple(erased),
        controls=tuple(parts.get("control", [])),
    )


def pooled(values: list[Value]) -> Measured:
    """The mean over seeds of one value.

    From three seeds on the interval is that of Student's t over seeds. Two seeds say too little about their spread, so
    their intervals over examples are joined; one seed keeps its own.
    """
    facts = metric(values[0].name)
    points = np.array([value.value for value in values])
    mean, n = float(points.mean()), min(value.n for value in values)
    better = values[0].better if values[0].better != "none" else facts.better
    low: float | None
    high: float | None
    if len(values) >= ENOUGH_SEEDS:
        half = float(stats.t.ppf(0.975, len(values) - 1) * points.std(ddof=1) / math.sqrt(len(values)))
        low, high, over = facts.clip(mean - half), facts.clip(mean + half), "seeds"
    else:
        lows = [value.low for value in values if value.low is not None and math.isfinite(value.low)]
        highs = [value.high for value in values if value.high is not None and math.isfinite(value.high)]
        low, high = min(lows, default=None), max(highs, default=None)
        over = "examples" if lows and highs else ""
    if not over:
        low = high = None
    return Measured(
        name=values[0].name, value=mean, n=n, low=low, high=high, better=better, seeds=len(values), over=over
    )
