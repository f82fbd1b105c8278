"""Caveats, generated from the facts: thin samples, blind spots, fidelity, deviations, failures."""

from __future__ import annotations

import dataclasses

from palimpsest.report.evidence import Evidence
from palimpsest.report.groups import ENOUGH_SEEDS, compare
from palimpsest.report.metrics import metric, rank

SMALL = 30
"""With fewer examples than this a value is named as thin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caveat:
    """A heading and the sentences under it."""

    title: str
    items: tuple[str, ...]


def caveats(evidence: Evidence) -> tuple[Caveat, ...]:
    """What a reader must keep in mind, under its headings; headings without content are left out."""
    found = (
        Caveat(title="How much was measured", items=samples(evidence)),
        Caveat(title="What failed", items=failures(evidence)),
        Caveat(title="How true to the sources", items=fidelity(evidence)),
        Caveat(title="What the measures are blind to", items=blind_spots(evidence)),
        Caveat(title="What the probes say in words", items=verdicts(evidence)),
        Caveat(title="What the probes remarked", items=remarks(evidence)),
    )
    return tuple(caveat for caveat in found if caveat.items)


def samples(evidence: Evidence) -> tuple[str, ...]:
    """Sentences on sample sizes and on what the intervals are over."""
    sides = compare(evidence)
    sizes: dict[int, list[str]] = {}
    for name in sorted({name for group in sides.all() for name in group.names()}, key=rank):
        value = next((value for group in sides.all() if (value := group.get(name))), None)
        if value is not None and value.n < SMALL:
            sizes.setdefault(value.n, []).append(metric(name).title)
    lines = [
        f"n = {n}, fewer than {SMALL}, so the interval is wide and the value may move with other records: "
        f"{'; '.join(titles)}."
        for n, titles in sorted(sizes.items())
    ]
    seeds = len(evidence.seeds) or max((len(group.members) for group in sides.all()), default=1)
    if seeds >= ENOUGH_SEEDS:
        lines.append(f"Values are means over {seeds} seeds; intervals are 95 % by Student's t over the seeds.")
    else:
        made = "One seed was" if seeds == 1 else f"{seeds} seeds were"
        lines.append(f"{made} run: intervals are 95 % over examples and leave out how training itself varies.")
    if sides.gold is None:
        lines.append("There is no model that never saw the erased records, so nothing here is compared with one.")
    return tuple(lines)


def failures(evidence: Evidence) -> tuple[str, ...]:
    """One sentence per probe that gave no reading."""
    return tuple(
        f"{model.title}, seed {model.seed}: the probe {failure.probe} failed ({failure.error.strip().rstrip('.')})."
        for model in evidence.models
        for failure in model.failures
    )


def fidelity(evidence: Evidence) -> tuple[str, ...]:
    """One sentence per method on how true it is to its source, with its known deviations."""
    lines = []
    for group in compare(evidence).all():
        if group.first.fidelity or group.first.deviations:
            lines.append(f"{group.title}: {'; '.join(filter(None, (group.first.fidelity, *group.first.deviations)))}.")
    return tuple(lines)


def blind_spots(evidence: Evidence) -> tuple[str, ...]:
    """What the metrics that were used cannot see."""
    names = sorted({name for group in compare(evidence).all() for name in group.names()}, key=rank)
    return tuple(dict.fromkeys(metric(name).blind for name in names if metric(name).blind))


def verdicts(evidence: Evidence) -> tuple[str, ...]:
    """What probes say about a model in words, of every seed."""
    return tuple(
        f"{model.title}, seed {model.seed}: {reading.verdict}"
        for model in evidence.models
        for reading in model.readings
        if reading.verdict
    )


def remarks(evidence: Evidence) -> tuple[str, ...]:
    """The caveats that the readings carry themselves, each once."""
    found = (
        f"{reading.probe}: {caveat}"
        for model in evidence.models
        for reading in model.readings
        for caveat in reading.caveats
    )
    return tuple(dict.fromkeys(found))
