"""From measured numbers to rows and verdicts: a number a seed, and what all seeds say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from palimpsest.report.evidence import ModelEvidence
from palimpsest.reproduce.runner import Check, Verdict
from palimpsest.system import Method, slug_of, to_dict

Seeds = Float[np.ndarray, " seeds"]


def values(models: Iterable[ModelEvidence], name: str) -> Seeds:
    """The value of that name of each of the models, in their order."""
    return np.array(
        [v.value for model in models for reading in model.readings for v in reading.values if v.name == name]
    )


def title_of(model: ModelEvidence, methods: Mapping[str, Method]) -> str:
    """Which of the methods made the model, by its settings; else the model's own name."""
    made = (title for title, m in methods.items() if model.name == slug_of(m) and model.settings == to_dict(m))
    return next(made, model.name)


Table = dict[str, dict[str, Seeds]]
"""A number a seed by the title of a model and by column."""


def tabled(models: Sequence[ModelEvidence], methods: Mapping[str, Method], columns: Mapping[str, str]) -> Table:
    """The columns (their names, and what the values are called) of the models before, gold and of every method."""
    groups = {title: [m for m in models if title_of(m, methods) == title] for title in ("before", "gold", *methods)}
    return {title: {c: values(own, name) for c, name in columns.items()} for title, own in groups.items()}


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


def at_least(expected: str, found: Seeds, bound: Seeds | float) -> Check:
    """Whether the numbers are at least what they must be."""
    return _judged(expected, found, bound, np.greater_equal)


def at_most(expected: str, found: Seeds, bound: Seeds | float) -> Check:
    """Whether the numbers are at most what they may be."""
    return _judged(expected, found, bound, np.less_equal)


def above(expected: str, found: Seeds, bound: Seeds | float) -> Check:
    """Whether the numbers are truly above others: equal ones are not."""
    return _judged(expected, found, bound, np.greater)


def below(expected: str, found: Seeds, bound: Seeds | float) -> Check:
    """Whether the numbers are truly below others: equal ones are not."""
    return _judged(expected, found, bound, np.less)


def _judged(expected: str, found: Seeds, bound: Seeds | float, right: np.ufunc) -> Check:
    """`holds` where every seed is right, `does not hold` where none is; a seed without a number decides nothing."""
    found, bound = np.asarray(found, dtype=float), np.asarray(bound, dtype=float)
    bound = np.full_like(found, bound) if bound.ndim == 0 else bound
    verdict: Verdict = "inconclusive"
    if len(found) == len(bound) and len(found) and not np.isnan([found, bound]).any():
        of_seed = right(found, bound)
        verdict = "holds" if of_seed.all() else "inconclusive" if of_seed.any() else "does not hold"
    return Check(expected=expected, found=f"{text(found)} against {text(bound)}", verdict=verdict)
