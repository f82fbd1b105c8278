"""One table of models against metrics, and its two plain forms: Markdown and a rich terminal table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from palimpsest.audit.reading import Better
from palimpsest.report.evidence import Evidence
from palimpsest.report.groups import Group, Measured, compare
from palimpsest.report.metrics import Closeness, metric, rank

if TYPE_CHECKING:
    from rich.table import Table as RichTable

ARROWS: dict[Better, str] = {"higher": "↑", "lower": "↓", "gold": "≈", "none": ""}
DIRECTIONS: dict[Better, str] = {
    "higher": "higher is better",
    "lower": "lower is better",
    "gold": "as close to gold as can be is best",
    "none": "",
}
CLOSENESS: dict[Closeness, tuple[str, str]] = {
    "at": ("●", "at gold"),
    "near": ("◐", "near gold"),
    "far": ("○", "far from gold"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One value of one model. `closeness` compares it with gold; None on gold itself and where gold has no value."""

    text: str
    interval: str = ""
    n: int = 0
    seeds: int = 1
    closeness: Closeness | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of the table: its name, titles, section and direction, and the numbers of examples behind it."""

    name: str
    title: str
    short: str
    section: str
    better: Better
    n: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One model of the table."""

    name: str
    title: str
    part: str
    judged: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Models against metrics; `cells[metric name, model name]` is missing where nothing was measured."""

    models: tuple[Column, ...]
    measures: tuple[Measure, ...]
    cells: dict[tuple[str, str], Cell]
    over: str

    def cell(self, measure: Measure, model: Column) -> Cell | None:
        """The cell of a metric and a model; None where nothing was measured."""
        return self.cells.get((measure.name, model.name))


def build(evidence: Evidence, metrics: Sequence[str] | None = None) -> Table:
    """The table of all measured values, or of the named ones in that order."""
    sides = compare(evidence)
    groups = sides.all()
    found = dict.fromkeys(name for group in groups for name in group.names())
    # the parts of the utility stand in the table under names of their own
    whole = [name for name in sorted(found, key=rank) if not name.startswith("part/")]
    names = [name for name in metrics if name in found] if metrics is not None else whole
    values = {(name, group.name): value for name in names for group in groups if (value := group.get(name))}
    cells = {
        (name, group.name): _cell(value, group, sides.gold)
        for name in names
        for group in groups
        if (value := values.get((name, group.name)))
    }
    measures = [_measure(name, [value for (key, _), value in values.items() if key == name]) for name in names]
    seeds = max((value.seeds for value in values.values()), default=1)
    return Table(
        models=tuple(
            Column(name=group.name, title=group.title, part=group.part, judged=group is sides.after) for group in groups
        ),
        measures=tuple(measure for measure in measures if measure is not None),
        cells=cells,
        over=f"{seeds} seeds" if any(value.over == "seeds" for value in values.values()) else "examples",
    )


def to_markdown(table: Table, by: Literal["models", "metrics"] = "models") -> str:
    """The table in GitHub's Markdown, one row per model or one per metric."""
    head, rows = _lines(table, by)
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def to_rich(
    table: Table, by: Literal["models", "metrics"] = "models", title: str = "", width: int | None = None
) -> RichTable:
    """The table for a terminal, one row per model or one per metric.

    Where it would be wider than `width` characters, it has short names, neither intervals nor counts, and a column for
    each of whichever are fewer, models or metrics.
    """
    from rich.console import Console

    drawn = _drawn(*_lines(table, by), title)
    if width is not None and Console(width=10_000).measure(drawn).maximum > width:
        by = "metrics" if len(table.models) < len(table.measures) else "models"
        drawn = _drawn(*_lines(table, by, short=True), title)
        for column in drawn.columns[1:] if by == "metrics" else drawn.columns[:1]:
            column.no_wrap = True  # names stay whole; titles of metrics fold
        drawn.caption = "intervals and numbers of examples are in the report"
    return drawn


def _drawn(head: list[str], rows: list[list[str]], title: str) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(title) if title else None, box=SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(head):
        drawn.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*[Text(cell) for cell in row])
    return drawn


def _lines(table: Table, by: str, short: bool = False) -> tuple[list[str], list[list[str]]]:
    def measure(m: Measure, title: str) -> str:
        return f"{title} {ARROWS[m.better]}".strip() + ("" if short else f" (n={m.n})")

    names = [model.name if short else model.title for model in table.models]
    cells = [[_text(table.cell(m, model), short) for m in table.measures] for model in table.models]
    if by == "models":
        head = ["model", *[measure(m, m.short) for m in table.measures]]
        return head, [[name, *row] for name, row in zip(names, cells, strict=True)]
    rows = [[measure(m, m.title), *column] for m, column in zip(table.measures, zip(*cells, strict=True), strict=True)]
    return ["metric", *names], rows


def _text(cell: Cell | None, short: bool = False) -> str:
    if cell is None:
        return "\N{EM DASH}"
    return " ".join(filter(None, (cell.text, f"[{cell.interval}]" if cell.interval and not short else "")))


def _cell(value: Measured, group: Group, gold: Group | None) -> Cell:
    facts = metric(value.name)
    reference = gold.number(value.name) if gold else None
    closeness = facts.closeness(value.value, reference) if reference is not None and group is not gold else None
    interval = ""
    if value.low is not None and value.high is not None:
        interval = f"{facts.show(value.low)}, {facts.show(value.high)}"
    return Cell(text=facts.show(value.value), interval=interval, n=value.n, seeds=value.seeds, closeness=closeness)


def _measure(name: str, values: Sequence[Measured]) -> Measure | None:
    if not values:
        return None
    facts, counts = metric(name), sorted({value.n for value in values})
    return Measure(
        name=name,
        title=facts.title,
        short=facts.short or facts.title,
        section=facts.section,
        better=values[0].better,
        n=str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}",
    )
