"""`palimpsest reproduce NAME`: a claim, the smallest honest experiment for it, and what came out.

A reproduction is a module of this package with a `REPRODUCTION`. Its `measure` is called once with all seeds; nothing
in it may be tuned on the figures that it returns.
"""

import dataclasses
import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.run import Run, console

Verdict = Literal["holds", "does not hold", "inconclusive"]
HELPERS = ("runner", "harness", "classifier", "judging", "domains", "memory_baselines")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One part of a claim: what should be seen, what was seen, and whether that is it."""

    expected: str
    found: str
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Lines by name, each through its points: places across and values up."""

    name: str
    across: str
    up: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The table of an experiment, what is better looked at than read, and the verdict on each part of the claim."""

    rows: Sequence[Mapping[str, Any]]
    checks: Sequence[Check]
    note: str = ""
    figures: Sequence[Figure] = ()

    @property
    def verdict(self) -> Verdict:
        """`holds` where every part holds; `does not hold` where one fails; else `inconclusive`."""
        verdicts = {check.verdict for check in self.checks}
        if "does not hold" in verdicts:
            return "does not hold"
        return "holds" if verdicts == {"holds"} else "inconclusive"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What is claimed, by whom, and how it is tried here."""

    claim: str
    source: str
    setting: str
    paper: str
    measure: Callable[[Sequence[int], Path, Run], Outcome]


def names() -> list[str]:
    """Everything that can be reproduced."""
    import palimpsest.reproduce as package

    modules = {module.name for module in pkgutil.iter_modules(package.__path__)} - set(HELPERS)
    return sorted(module.replace("_", "-") for module in modules)


def find(name: str) -> Reproduction:
    """The reproduction of that name; an unknown one raises."""
    if name not in names():
        raise PalimpsestError(f"there is no reproduction {name!r}. {nearest(name, names())}")
    return importlib.import_module(f"palimpsest.reproduce.{name.replace('-', '_')}").REPRODUCTION


def markdown(reproduction: Reproduction, outcome: Outcome, seconds: float, seeds: Sequence[int]) -> str:
    """The page of a reproduction: claim, setting, table, verdict."""
    columns = list(outcome.rows[0])
    lines = [
        f"**Claim.** {reproduction.claim} ({reproduction.source})",
        "",
        f"**Here.** {reproduction.setting} Seeds {', '.join(map(str, seeds))}; {seconds:.0f} s.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in outcome.rows),
        "",
        *(f"![{figure.up} against {figure.across}]({figure.name}.svg)\n" for figure in outcome.figures),
        f"**The paper's own figures.** {reproduction.paper}",
        "",
        "| expected | found | verdict |",
        "|---|---|---|",
        *(f"| {check.expected} | {check.found} | {check.verdict} |" for check in outcome.checks),
        "",
        f"**Verdict: {outcome.verdict}.** {outcome.note}".rstrip(),
    ]
    return "\n".join(lines) + "\n"


def draw(figures: Sequence[Figure], folder: Path) -> None:
    """Writes each figure into the folder as `<name>.svg`."""
    if not figures:
        return
    from palimpsest.report.plots import lines, standalone

    for figure in figures:
        svg = standalone(lines(figure.lines, figure.across, figure.up))
        (folder / f"{figure.name}.svg").write_text(svg, encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def command(words: list[str]) -> None:
    """`palimpsest reproduce`."""
    import tyro

    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Tries a published claim here and says whether it holds."""

        name: tyro.conf.Positional[str]
        """which reproduction"""
        seeds: int = 3
        """how many seeds"""
        out: Path = Path("out/reproduce")
        """folder for intermediate results; the same command goes on from them"""
        json: bool = False
        """print JSON instead of Markdown"""
        quiet: bool = False
        """no progress bars"""

    options = tyro.cli(Options, args=words, prog="palimpsest reproduce")
    name = options.name.replace("_", "-")
    reproduction = find(name)
    if options.seeds < 1:
        raise PalimpsestError(f"seeds is {options.seeds}, expected at least 1.")
    seeds = list(range(options.seeds))
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    outcome = reproduction.measure(seeds, folder, Run(progress=not options.quiet))
    seconds = time.perf_counter() - start
    page = markdown(reproduction, outcome, seconds, seeds)
    (folder / "result.md").write_text(page, encoding="utf-8")
    draw(outcome.figures, folder)
    result = dataclasses.asdict(outcome) | {"verdict": outcome.verdict, "seconds": seconds, "claim": reproduction.claim}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1) if options.json else page)
    console().print(f"written to {folder / 'result.md'}")
