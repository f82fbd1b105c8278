"""From measured numbers to rows and verdicts: a number a seed, and what all seeds say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from palimpsest.report.evidence import ModelEvidence
from palimpsest.reproduce.runner import Check, Verdict

Seeds = Float[np.ndarray, " seeds"]


def values(models: Iterable[ModelEvidence], name: str) -> Seeds:
    """The value of that name of each of the models, in their order."""
    return np.array(
        [v.value for model in models for reading in model.readings for v in reading.values if v.name == name]
    )


def text(numbers: Seeds) -> str:
    """Mean and standard deviation over seeds; a dash where there is no number."""
    numbers = np.asarray(numbers, dtype=float)
    if not len(numbers):
        return "-"
    mean = numbers.mean()
    shown = f"{mean:.2f}" if mean == 0 or abs(mean) >= 0.01 else f"{mean:.1e}"
    return shown + (f" ± {numbers.std(ddof=1):.2f}" if len(numbers) > 1 else "")


def row(title: str, columns: Mapping[str, Seeds]) -> dict[str, str]:
    """One line of the table."""
    return {"model": title} | {column: text(numbers) for column, numbers in columns.items()}


def at_least(expected: str, found: Seeds, least: Seeds | float) -> Check:
    """`holds` where every seed's number is at least what it must be, `does not hold` where none is."""
    found = np.asarray(found, dtype=float)
    bound = np.broadcast_to(np.asarray(least, dtype=float), found.shape) if np.ndim(least) == 0 else np.asarray(least)
    verdict: Verdict = "inconclusive"
    if len(found) == len(bound) and len(found):
        right = found >= bound
        verdict = "holds" if right.all() else "inconclusive" if right.any() else "does not hold"
    return Check(expected=expected, found=f"{text(found)} against {text(bound)}", verdict=verdict)


def at_most(expected: str, found: Seeds, most: Seeds | float) -> Check:
    """`holds` where every seed's number is at most what it may be, `does not hold` where none is."""
    turned = at_least(expected, -np.asarray(found, dtype=float), -np.asarray(most, dtype=float))
    bound = np.broadcast_to(np.asarray(most, dtype=float), np.shape(found)) if np.ndim(most) == 0 else np.asarray(most)
    return Check(expected=expected, found=f"{text(found)} against {text(bound)}", verdict=turned.verdict)
