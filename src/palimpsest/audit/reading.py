"""Readings: what a probe found, each value with its unit, direction, number of examples and interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Better = Literal["higher", "lower", "gold", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """One number. `better` says which way is good for an erasure; `gold`: as close to the gold model as can be."""

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    unit: str = ""
    better: Better = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What one probe found on one model: values, per-example arrays behind them, and what to keep in mind.

    `verdict` is what the probe says about the model in words, where it does.
    """

    probe: str
    values: tuple[Value, ...]
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    caveats: tuple[str, ...] = ()
    verdict: str = ""
    seconds: float = 0.0

    def __getitem__(self, name: str) -> Value:
        for value in self.values:
            if value.name == name:
                return value
        raise KeyError(f"{self.probe} has no value {name!r}: {', '.join(v.name for v in self.values)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Reading:
        """The reading that `to_dict` wrote."""
        values = tuple(Value(**value) for value in saved["values"])
        return cls(**{**saved, "values": values, "caveats": tuple(saved["caveats"])})


def mean_value(
    name: str, samples: Sequence[float] | np.ndarray, *, unit: str = "", better: Better = "none", seed: int = 0
) -> Value:
    """The mean of per-example numbers with its 95 % bootstrap interval over examples."""
    return bootstrap_value(name, np.asarray(samples, dtype=float), np.mean, unit=unit, better=better, seed=seed)


def bootstrap_value(
    name: str,
    samples: np.ndarray,
    statistic: Callable[..., Any],
    *,
    unit: str = "",
    better: Better = "none",
    seed: int = 0,
    resamples: int = 1000,
) -> Value:
    """A statistic of per-example numbers [n] (or rows [n, ...]) with its 95 % percentile bootstrap interval.

    `statistic(samples, axis)` must reduce along `axis`, so that all resamples are computed at once.
    """
    n = len(samples)
    if n == 0:
        return Value(name=name, value=float("nan"), n=0, unit=unit, better=better)
    point = float(statistic(samples, axis=0))
    rows = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    resampled = statistic(samples[rows], axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Value(name=name, value=point, n=n, low=float(low), high=float(high), unit=unit, better=better)
