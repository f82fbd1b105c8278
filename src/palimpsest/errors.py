"""The one error that users meet, and the search for what they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PalimpsestError(ValueError):
    """A wrong input or a broken state: one sentence naming the cause, the offender and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean "x"?` for the closest known names, or the list of all where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close = close or [each for each in known if name and name.lower() in each.lower()][:3]
    if close:
        return "Did you mean " + " or ".join(f'"{match}"' for match in close) + "?"
    return "Known: " + ", ".join(known) + "."
