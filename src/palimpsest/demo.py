"""`palimpsest demo`: people are written into a real language model, some are erased, and a report shows what is left.

Offline, on the embedded model. Everything that was computed is kept in the folder: a second run reuses it.
"""

import dataclasses
import shlex
import time
from pathlib import Path

from palimpsest.comparing import publish
from palimpsest.comparison import compare
from palimpsest.run import Run, console
from palimpsest.tasks import PEOPLE, people_task, tuned

METHODS = ("stranger", "npo", "gradient-difference")
"""The default eraser, chosen on validation people that the demo does not use, and two published ones."""


def command(words: list[str]) -> None:
    """`palimpsest demo`."""
    import tyro

    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Writes fictitious people into the embedded model, erases some of them, audits, and writes a report."""

        out: Path = Path("palimpsest-demo")
        """folder for models, results and the report"""
        seed: int = 0
        """which people are generated"""
        quiet: bool = False
        """no progress bars"""

    options = tyro.cli(Options, args=words, prog="palimpsest demo")
    start = time.perf_counter()
    task = dataclasses.replace(people_task(), command="palimpsest demo " + shlex.join(words))
    found = compare(
        task,
        tuned(METHODS, PEOPLE),
        options.out,
        seeds=(options.seed,),
        run=Run(progress=not options.quiet),
        default=METHODS[0],
    )
    publish(found, options.out)
    console().print(f"done in {time.perf_counter() - start:.0f} s")
