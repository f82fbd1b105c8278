"""`palimpsest compare`: methods x probes x seeds on one task, and what comes out as a table and a page."""

import ast
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.comparison import Task, compare
from palimpsest.errors import PalimpsestError, nearest
from palimpsest.run import Run, console
from palimpsest.tasks import BASELINES, EMBEDDED, HARNESS, PEOPLE, harness_task, people_task, tofu_task, tuned
from palimpsest.tuning import grids_of, to_markdown, tune


def command(words: list[str]) -> None:
    """`palimpsest compare`."""
    import tyro

    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Methods x probes x seeds on one task: evidence.json, table.md and report.html. Resumes where it stopped."""

        task: tyro.conf.Positional[str]
        """harness, people or tofu"""
        out: Path
        """folder for results; cells that are already there are not computed again"""
        methods: tuple[str, ...] = BASELINES
        """which methods"""
        seeds: int = 1
        """how many seeds, from --first-seed on"""
        first_seed: int = 0
        """the first seed"""
        probes: tuple[str, ...] = ()
        """which probes; all of the standard battery by default"""
        set: dict[str, str] = dataclasses.field(default_factory=dict)
        """settings of all methods: --set training.learning_rate 1e-5"""
        split: str = "forget05"
        """TOFU split"""
        source: Path | None = None
        """folder with the TOFU files; without it, the hub"""
        authors: int | None = None
        """only this many retained TOFU authors"""
        forget_authors: int | None = None
        """only this many forgotten TOFU authors"""
        measured: int | None = None
        """measure on at most this many records of each TOFU role"""
        max_new_tokens: int | None = None
        """longest generated answer, tokens"""
        default: str | None = None
        """the method that the verdict is about"""
        tune: bool = False
        """instead: try a few values of each method's main setting on validation data; tuning.md says which is best"""
        keep_models: bool = True
        """keep what learned in --out/models: another method or probe need not learn it again"""
        quiet: bool = False
        """no progress bars"""

    options = tyro.cli(Options, args=words, prog="palimpsest compare")
    battery = options.probes or None
    tokens: dict[str, Any] = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    if options.task == "harness":
        task, table = harness_task(battery), HARNESS
    elif options.task == "people":
        task, table = people_task(battery=battery, **tokens), PEOPLE
    elif options.task == "tofu":
        task = tofu_task(
            options.split,
            options.source,
            options.authors,
            options.forget_authors,
            options.measured,
            battery=battery,
            **tokens,
        )
        table = EMBEDDED
    else:
        raise PalimpsestError(
            f"there is no task {options.task!r}. {nearest(options.task, ('harness', 'people', 'tofu'))}"
        )
    if options.seeds < 1:
        raise PalimpsestError(f"seeds is {options.seeds}, expected at least 1.")
    if options.default is not None and options.default not in options.methods:
        raise PalimpsestError(f"the verdict cannot be about {options.default}: it is not among the methods compared.")
    wanted = {key: _value(text) for key, text in options.set.items()}
    methods = tuned(options.methods, table, wanted)
    if options.tune:
        _tune(task, options.methods, {**table, "*": {**table["*"], **wanted}}, options.out, not options.quiet)
        return
    task = dataclasses.replace(task, command="palimpsest compare " + shlex.join(words))
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = compare(
        task,
        methods,
        options.out,
        seeds=list(seeds),
        run=Run(progress=not options.quiet),
        default=options.default,
        keep_models=options.keep_models,
    )
    publish(found, options.out)


def _tune(
    task: Task, names: Sequence[str], table: Mapping[str, Mapping[str, Any]], folder: Path, progress: bool
) -> None:
    from palimpsest.report.evidence import write_atomically

    grids = grids_of(task.name)
    found = to_markdown(tune(task, names, table, folder, Run(progress=progress), grids), grids)
    write_atomically(folder / "tuning.md", found + "\n")
    print(found)


def publish(found: Any, folder: Path) -> None:
    """Writes evidence.json, table.md and report.html, prints the table, and then the report's path."""
    from palimpsest.report import evidence, metrics, page, table

    evidence.save(found, folder / "evidence.json")
    (folder / "table.md").write_text(table.to_markdown(table.build(found)) + "\n", encoding="utf-8")
    console().print(table.to_rich(table.build(found, metrics.KEY), width=console().width))
    print(page.write(found, folder / "report.html"))


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
