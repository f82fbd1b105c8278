"""How much a memory still matters, and which are let go.

    a       turn - turn of the memory            [chunks]  age, turns
    delta   1 where it was retrieved within the last `window` turns, else 0
    w = lambda exp(-gamma a) + beta delta                  salience, as the text of the paper means it
    w = lambda exp(-gamma a) + beta (1 - delta)            as its formula is printed

Source: Ahn 2025 (arXiv 2504.16754), the salience formula. As printed, the bonus goes to what was not retrieved and the
most used memories go first, which contradicts the paper's own legend.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Mode = Literal["intended", "as-printed"]
Chunks = Int[np.ndarray, " chunks"]


def recently_retrieved(turn: int, last_retrieved: Chunks, window: int) -> Bool[np.ndarray, " chunks"]:
    """delta: whether 0 <= turn - last_retrieved <= window; a negative `last_retrieved` is never."""
    since = turn - last_retrieved
    return (last_retrieved >= 0) & (since >= 0) & (since <= window)


def salience(
    age: Chunks, delta: Bool[np.ndarray, " chunks"], strength: float, decay: float, bonus: float, mode: Mode
) -> Float[np.ndarray, " chunks"]:
    """w with lambda = strength, gamma = decay a turn, beta = bonus; an age below zero counts as zero."""
    rewarded = delta if mode == "intended" else ~delta
    return strength * np.exp(-decay * np.maximum(age, 0)) + bonus * rewarded


def prune_count(alive: int, fraction: float, carry: float) -> tuple[int, float]:
    """How many of `alive` memories go now, and the fraction of one that is left for the next time."""
    due = fraction * alive + carry
    count = min(math.floor(due + 1e-9), alive)  # 0.005 * 200 is 1, whatever the rounding
    return count, max(0.0, due - count)


def least_salient(
    weights: Float[np.ndarray, " chunks"], turn: Chunks, number: Chunks, keep: Bool[np.ndarray, " chunks"], count: int
) -> Int[np.ndarray, " pruned"]:
    """Places of the `count` lightest that need not be kept; of equal ones the oldest go first."""
    order = np.lexsort((number, turn, weights))
    return order[~keep[order]][:count]
