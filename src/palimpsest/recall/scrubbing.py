"""Between a removal and its scrubbing, on any engine: what is outstanding, making it good, and saying so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import Engine
from palimpsest.recall.reading import counter

LEFT = "bytes of removed memories may be left in the file"


def outstanding(engine: Engine) -> bool:
    """Whether something was removed since the last scrub that ended."""
    return counter(engine, "scrubs") != counter(engine, "forgets")


def make_good(engine: Engine) -> None:
    """Scrubs what a kill between a removal and its scrubbing left; warns where that cannot be done yet."""
    if not outstanding(engine):
        return
    try:
        engine.scrub()
    except PalimpsestError as error:
        warnings.warn(str(error), stacklevel=2)


@contextmanager
def told_as_removed(name: str) -> Iterator[None]:
    """Says of an error in scrubbing that the removal itself stands."""
    try:
        yield
    except PalimpsestError as error:
        cause = str(error.__cause__ or error).strip().rstrip(".")
        raise PalimpsestError(
            f"{name}: removed, but not yet scrubbed: {cause}. Run `doctor --scrub` when that has passed."
        ) from error
