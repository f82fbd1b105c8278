"""The report as one HTML file that needs nothing but itself."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from palimpsest.report import plots
from palimpsest.report.caveats import caveats
from palimpsest.report.differences import Marked, differences
from palimpsest.report.evidence import Evidence, write_atomically
from palimpsest.report.groups import Comparison, Group, compare
from palimpsest.report.metrics import SECTIONS, p_value
from palimpsest.report.notes import told
from palimpsest.report.table import ARROWS, CLOSENESS, DIRECTIONS, build
from palimpsest.report.verdict import verdict

SHOWN = {"forget": 6, "retain": 3}
"""How many answers of a role are open before the rest is folded away."""
SHAPES = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "<": "◀", "*": "★"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt with the answers before and after, words that differ marked, and gold's answer where there is one."""

    prompt: str
    reference: str
    before: Marked
    after: Marked
    gold: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """One drawing with its title and explanation, or the reason why it is missing."""

    title: str
    text: str
    svg: Markup | None
    missing: str = ""


def write(evidence: Evidence, path: str | Path) -> Path:
    """The path of the written page; an old page is replaced at once or not at all."""
    return write_atomically(path, render(evidence))


def render(evidence: Evidence) -> str:
    """The whole page as HTML: styles and drawings are inside, all text of the evidence is escaped."""
    sides = compare(evidence)
    table = build(evidence)
    styles = plots.styles(sides)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            evidence=evidence,
            css=Markup(resources.files("palimpsest.report").joinpath("page.css").read_text(encoding="utf-8")),
            verdict=verdict(evidence),
            sides=sides,
            groups=sides.all(),
            table=table,
            sections=[
                (section, rows) for section in SECTIONS if (rows := [m for m in table.measures if m.section == section])
            ],
            missing=[group.title for group in sides.all() if not group.names()],
            marks={name: (variable, SHAPES[marker]) for name, (variable, marker) in styles.items()},
            arrows=ARROWS,
            directions=DIRECTIONS,
            closeness=CLOSENESS,
            plots=drawings(sides),
            answers={role: pairs(sides, role) for role in SHOWN},
            shown=SHOWN,
            strips=strips(sides),
            largest=largest_change(sides),
            told=told(sides),
            costs=[(group, group.cost()) for group in sides.all() if group.cost().seconds or group.cost().peak_bytes],
            longest=max((group.cost().seconds for group in sides.all()), default=0.0),
            caveats=caveats(evidence),
        )
    )


def drawings(sides: Comparison) -> tuple[Plot, ...]:
    """The four plots of the trade-off, each either drawn or with the reason why not, and those of the features."""
    several = "Needs model utility and this measure on at least two models."
    return (
        _plot(
            "What was erased against what was kept",
            "Down is forgetting, right is keeping. The goal is gold: where a model is that never saw the records.",
            plots.plane(sides, "rouge/forget", "recall of the erased answers (lower forgets more)"),
            several,
        ),
        _plot(
            "Can it be told from gold?",
            "Forget quality on a logarithmic scale: the p-value of a test that compares the truth ratios with gold's.",
            plots.plane(sides, "forget_quality", "log₁₀ of forget quality (higher is closer to gold)"),
            several,
        ),
        _plot(
            "Right answers against wrong ones",
            "For each erased question: how probable wrong answers are beside the right one. A model that forgot lies "
            "on gold's curve, neither left of it (still knows) nor right of it (avoids).",
            plots.truth_ratios(sides),
            "No model has truth ratios.",
        ),
        _plot(
            "Does it come back?",
            "Each model is taught a few erased records again. What was only hidden returns faster than in gold.",
            plots.relearning(sides),
            "No relearning attack was run.",
        ),
        *representations(sides),
    )


def representations(sides: Comparison) -> tuple[Plot, ...]:
    """The plots of the probe of features, where it was run: logits against features, and likeness by layer."""
    agreement = plots.plane(
        sides, "agr", "agreement of features with gold (AGR)", "agl", "agreement of logits with gold (AGL)"
    )
    found = [
        (
            "Do the features agree, or only the answers?",
            "Right is what tests on answers see, up what features show. Right and low is an edit of the last layer. "
            "The model before and a second gold say how low and high AGR can be.",
            agreement,
        )
    ]
    for other, words in (
        ("gold", "gold, on the erased records"),
        ("before", "the model before, on the erased records"),
    ):
        title, text = f"Likeness to {words.partition(',')[0]}", "CKA layer by layer; 1 is the same up to rotation."
        found.append((title, text, plots.likeness(sides, other, f"likeness (CKA) to {words}")))
    return tuple(_plot(title, text, svg, "") for title, text, svg in found if svg)


def pairs(sides: Comparison, role: str) -> tuple[Pair, ...]:
    """The answers of one role before and after, by prompt, of the first seed."""
    if sides.after is None:
        return ()
    old = _answers(sides.before, role)
    gold = _answers(sides.gold, role)
    found = []
    for answer in sides.after.first.answers:
        if answer.role != role:
            continue
        if answer.prompt in old:
            before, after = differences(old[answer.prompt], answer.answer)
        else:
            before, after = [], [(answer.answer, False)]
        found.append(
            Pair(
                prompt=answer.prompt,
                reference=answer.reference,
                before=before,
                after=after,
                gold=gold.get(answer.prompt),
            )
        )
    return tuple(found)


def largest_change(sides: Comparison) -> float:
    """The largest relative norm of any layer of any model: full colour in the heat strips."""
    weights = [group.first.weights for group in sides.all() if group.first.weights is not None]
    norms = [norm.relative for one in weights for norm in one.norms if norm.relative is not None]
    return max((norm for norm in norms if math.isfinite(norm)), default=0.0)


def strips(sides: Comparison) -> tuple[tuple[Group, Markup | None], ...]:
    """Every changed model with its heat strip, all on the same colour scale."""
    groups = [group for group in sides.all() if group.first.weights is not None]
    limit = largest_change(sides)
    drawn = [(group, plots.heat_strip(group, limit)) for group in groups]
    return tuple((group, Markup(svg) if svg else None) for group, svg in drawn)


def _answers(group: Group | None, role: str) -> dict[str, str]:
    return {answer.prompt: answer.answer for answer in group.first.answers if answer.role == role} if group else {}


def _plot(title: str, text: str, svg: str | None, missing: str) -> Plot:
    return Plot(title=title, text=text, svg=Markup(svg) if svg else None, missing=missing)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("palimpsest.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        duration=duration, memory=memory, thousands=thousands, pretty=pretty, p=p_value, share=share
    )
    return environment


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(size: float) -> str:
    """Bytes in GB or MB; a dash for none."""
    if size <= 0:
        return "\N{EM DASH}"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def thousands(number: int) -> str:
    """A whole number in groups of three."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def share(part: float, whole: float) -> str:
    """A part of a whole as a percentage; empty where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def pretty(value: Any) -> str:
    """JSON for a reader."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str, sort_keys=False)
