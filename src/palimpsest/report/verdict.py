"""The verdict: a headline, a few sentences and four large figures for a reader who is no specialist."""

from __future__ import annotations

import dataclasses

from palimpsest.report.evidence import Evidence
from palimpsest.report.groups import Comparison, compare
from palimpsest.report.metrics import metric
from palimpsest.report.rules import RULES, SIGNIFICANT, WRECKED, Finding, Tone
from palimpsest.report.sentences import (
    KEPT,
    MARGIN,
    about,
    attack,
    interval,
    kept,
    membership_sentence,
    recall,
    recall_name,
    recall_sentence,
    utility_sentence,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One large number: what it is, its judgement, and the marks (label, position from 0 to 1) on its scale."""

    label: str
    value: str
    note: str
    tone: Tone | None
    marks: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a report says first. `judged` is the title of the model it is about."""

    outcome: str
    tone: Tone
    headline: str
    sentences: tuple[str, ...]
    findings: tuple[Finding, ...]
    figures: tuple[Figure, ...]
    judged: str


def verdict(evidence: Evidence) -> Verdict:
    """The verdict on the erased model that the evidence names as default."""
    sides, who = compare(evidence), about(evidence)
    findings = tuple(finding for rule in RULES if (finding := rule(sides, who)) is not None)
    numbers = (recall_sentence(sides), membership_sentence(sides), utility_sentence(sides))
    return Verdict(
        outcome=findings[0].kind,
        tone=findings[0].tone,
        headline=findings[0].headline,
        sentences=(*filter(None, numbers), *(finding.text for finding in findings if finding.text)),
        findings=findings,
        figures=(_recall(sides), _membership(sides), _utility(sides), _quality(sides)),
        judged=sides.after.title if sides.after else "",
    )


def _recall(sides: Comparison) -> Figure:
    name = recall_name(sides)
    before, after, gold = recall(sides)
    label = "recognition of what was erased" if name == "accuracy/forget" else "recall of what was erased"
    if name is None or before is None or after is None:
        return _missing(label)
    show = metric(name).show
    note = " · ".join(
        filter(None, (f"before {show(before.value)}", f"never saw it {show(gold.value)}" if gold else ""))
    )
    marks = [("before", before.value), ("after", after.value), *([("gold", gold.value)] if gold else [])]
    excess = after.value - (gold.value if gold else 0.0)
    tone: Tone = "good" if abs(excess) <= MARGIN + 1e-9 else "mixed" if excess < 0 else "bad"
    return Figure(label=label, value=show(after.value), note=note, tone=tone, marks=_clipped(marks))


def _membership(sides: Comparison) -> Figure:
    label, name = "membership attack, AUC", attack(sides)
    found = sides.after.get(name) if sides.after and name else None
    if found is None or name is None:
        return _missing(label)
    before, gold = (group.number(name) if group else None for group in (sides.before, sides.gold))
    target = 0.5 if gold is None else gold
    tone: Tone = "good" if min(abs(found.value - target), abs(found.value - 0.5)) <= MARGIN else "bad"
    marks = [("before", before), ("after", found.value), ("gold", gold), ("chance", 0.5)]
    note = " · ".join(filter(None, ("chance 0.50", f"95 %: {interval(found)}" if interval(found) else "")))
    return Figure(
        label=label,
        value=f"{found.value:.2f}",
        note=note,
        tone=tone,
        marks=_clipped([(who, at) for who, at in marks if at is not None]),
    )


def _utility(sides: Comparison) -> Figure:
    label, share = "utility kept", kept(sides)
    if share is None:
        return _missing(label)
    tone: Tone = "good" if share >= KEPT else "mixed" if share >= WRECKED else "bad"
    before, after = (group.number("model_utility") if group else None for group in (sides.before, sides.after))
    note = (
        "of what should have stayed"
        if before is None or after is None
        else f"model utility {before:.2f}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{after:.2f}"
    )
    return Figure(label=label, value=f"{100 * share:.0f} %", note=note, tone=tone, marks=_clipped([("after", share)]))


def _quality(sides: Comparison) -> Figure:
    label = "forget quality, p"
    found = sides.after.get("forget_quality") if sides.after else None
    if found is None:
        return _missing(label)
    told = found.value < SIGNIFICANT
    note = "told from a model that never saw it" if told else "not told from a model that never saw it"
    tone: Tone = "bad" if told else "good"
    start = sides.before.get("forget_quality") if sides.before else None
    if not told and start is not None and start.value >= SIGNIFICANT:
        note, tone = "too few records: the model before is not told from one that never saw them, either", "mixed"
    value = metric(found.name).show(found.value)
    marks = _clipped([("limit", SIGNIFICANT), ("after", found.value)])
    return Figure(label=label, value=value, note=note, tone=tone, marks=marks)


def _missing(label: str) -> Figure:
    return Figure(label=label, value="\N{EM DASH}", note="not measured", tone=None)


def _clipped(marks: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple((who, min(max(at, 0.0), 1.0)) for who, at in marks)
