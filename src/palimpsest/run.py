"""One run: seed, device, precision, progress, working folder, resume."""

from __future__ import annotations

import dataclasses
import numbers
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from palimpsest.errors import PalimpsestError, nearest

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]
T = TypeVar("T")


@dataclasses.dataclass(kw_only=True)
class Run:
    """How work is carried out, as opposed to what is done.

    `folder` holds checkpoints of long work; with `resume`, work that was killed goes on from its last one. `in_place`
    allows a method to change the model it was given, which saves a copy of the weights. `stop(step, model)` is asked
    after every training step, and ends the training where it says so; `penalty(batch)` is added to whatever a method
    minimises (a method that works through another one sets it). `cache` carries what several
    probes share (token log-probabilities, generations) and lives as long as the run. `notes` is what a method says
    about its own work (see `note`). `job` tells the work of one method with its settings from that of another, so
    that no checkpoint is taken up by the wrong one.
    """

    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    folder: Path | None = None
    resume: bool = True
    progress: bool = True
    in_place: bool = False
    checkpoint_seconds: float = 120.0
    stop: Callable[[int, Any], bool] | None = dataclasses.field(default=None, repr=False)
    penalty: Callable[[Any], Any] | None = dataclasses.field(default=None, repr=False)
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    job: str = ""

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder = Path(self.folder)
        if not isinstance(self.seed, numbers.Integral) or self.seed < 0:
            raise PalimpsestError(f"seed is {self.seed!r}, expected a whole number of 0 or more.")
        self.seed = int(self.seed)  # as JSON knows it
        if self.precision not in get_args(Precision):
            raise PalimpsestError(
                f"precision is {self.precision!r}. {nearest(str(self.precision), get_args(Precision))}"
            )

    def replace(self, **changes: Any) -> Run:
        """A copy with some fields changed, sharing the cache."""
        return dataclasses.replace(self, **changes)

    def note(self, **values: Any) -> None:
        """Keeps what a method found or did, for its ledger entry and the report.

        A value is a number, a text, or an array of numbers of one or two dimensions: a curve or a heat map. A
        dictionary of equally long arrays is a drawing of the others against the first.
        """
        self.notes.update({name: _plain(value) for name, value in values.items()})

    def warn(self, text: str) -> None:
        """Says at once, and in the ledger entry, what a user should know before trusting the result."""
        told = self.notes.setdefault("warnings", [])
        if text not in told:
            told.append(text)
            self.tell(text)

    def tell(self, text: str) -> None:
        """Says at once what a user who watches should know; nothing where progress is not shown."""
        if self.progress:
            console().print(text, style="yellow", highlight=False, markup=False)

    def torch_device(self) -> torch.device:
        """The device that is meant: `auto` is the accelerator where there is one."""
        import torch

        if self.device != "auto":
            try:
                return torch.empty(0, device=self.device).device
            except (RuntimeError, AssertionError) as error:
                reason = str(error).strip().splitlines()[0].rstrip(".")
                raise PalimpsestError(f"the device {self.device!r} cannot be used here: {reason}.") from None
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def generator(self, salt: int = 0) -> torch.Generator:
        """A CPU random generator that depends on the seed and `salt` only."""
        import torch

        return torch.Generator().manual_seed(self.seed * 1_000_003 + salt)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Global random state of torch, numpy and Python set from the seed inside, and put back afterwards."""
        import numpy as np
        import torch

        drawn = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                np.random.seed(self.seed % 2**32)
                random.seed(self.seed)
                yield
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, with a progress bar that shows an estimate of the time left."""
        if total is None:
            total = len(items) if isinstance(items, Sized) else None
        with self.bar(label, total) as advance:
            for item in items:
                yield item
                advance(1)

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Any]:
        """A progress bar; yields `advance(steps, note="")`."""
        if not self.progress:
            yield lambda steps=1, note="": None
            return
        if not console().is_terminal:
            with _line_per_minute(label, total) as advance:
                yield advance
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console()) as progress:
            task = progress.add_task(label, total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                progress.update(task, advance=steps, note=note)

            yield advance


def _plain(value: Any) -> Any:
    """JSON values: of tensors and arrays their numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def _line_per_minute(label: str, total: int | None, every: float = 30.0) -> Iterator[Any]:
    """Progress for logs and pipes, where a bar cannot be redrawn: a line now and then, and one at the end."""
    start = last = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = f", about {(now - start) / done * (total - done):.0f} s left" if total and done else ""
            console().print(f"{label}: {done}/{total or '?'} in {now - start:.0f} s{left} {note}", highlight=False)

    yield advance
    if time.monotonic() - start >= every:
        console().print(f"{label}: done in {time.monotonic() - start:.0f} s", highlight=False)


def console() -> Any:
    """The console for progress and messages: standard error, so that standard output stays clean for results."""
    from rich.console import Console

    global _CONSOLE
    if _CONSOLE is None:
        _CONSOLE = Console(stderr=True)
    return _CONSOLE


_CONSOLE: Any = None


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds and peak memory (bytes of this process's resident set) of the block, filled in at its end.

    Where the system lets a process reset its peak (Linux), the peak is that of the block alone.
    """
    cost: dict[str, float] = {}
    _reset_peak()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost["seconds"] = time.perf_counter() - start
        cost["peak_bytes"] = _peak_bytes()


def _reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
