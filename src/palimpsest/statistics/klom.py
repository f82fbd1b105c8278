"""KLoM: how far many unlearned models are from many retrained ones, point by point, in the margins that they give.

One model says little: two trainings of one recipe differ. KLoM asks of every data point whether the *distribution* of
its margin over unlearned models is that over models that never saw the forget set (oracles).

    phi    margin     [models, points]  z_y - logsumexp_{c != y} z_c, nats; clipped to [-100, 100]
    p, q   histogram  [points, bins]    shares of the unlearned models and of the oracles in 20 equal bins over the
                                        common range of both

    KLoM = sum_b p_b ln(p_b / max(q_b, 1e-5))      0 .. -ln 1e-5 = 11.51, nats

It is not 0 between two sets of oracles: with N models of either kind its mean over points is about 3 (N = 20), 0.9
(50), 0.36 (100) or 0.15 (200). Below 100 models it says little; no value means anything beside its floor.

Source: Georgiev et al. 2025 (arXiv 2410.23232). Differs: the last bin is closed. All published code leaves it open, so
that the largest margin falls out of every bin, and the value is 0 (`easydub`, `bench`) or NaN (`direct`) where all
unlearned margins are the largest. `compat` computes what that code does: `direct`, that of the paper's
time, has 19 bins, clips the unlearned margins only and gives the floor to every bin of q, which then sums to one;
`bench` has 20, lets q sum to one again, and takes the two arguments the other way round; `easydub` has 20 bins and is
the formula above.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError, nearest

Compat = Literal["closed", "direct", "bench", "easydub"]
BINS, LEAST, CLIP = 20, 1e-5, 100.0
MAXIMUM = -math.log(LEAST)
FEW = 50
"""Models below which the floor is most of the value."""
CHUNK = 4096
"""Points computed at once: memory, not result."""


def klom(
    unlearned: Float[Tensor, "models points"], oracle: Float[Tensor, "models points"], compat: Compat = "closed"
) -> Float[Tensor, " points"]:
    """KLoM of every point, nats, float64; raises where the two do not fit together or a margin is NaN."""
    if compat not in get_args(Compat):
        raise PalimpsestError(f"compat is {compat!r}. {nearest(str(compat), get_args(Compat))}")
    _check(unlearned, oracle)
    first, second = (oracle, unlearned) if compat == "bench" else (unlearned, oracle)
    clips = (
        first.double().clamp(-CLIP, CLIP),
        second.double() if compat == "direct" else second.double().clamp(-CLIP, CLIP),
    )
    if not torch.isfinite(clips[1]).all():
        raise PalimpsestError("compat is direct, which does not clip the margins of oracles, but some are infinite.")
    parts = zip(*(x.cpu().T.contiguous().split(CHUNK) for x in clips), strict=True)
    return torch.cat([_divergence(p, q, compat) for p, q in parts])


def _divergence(
    first: Float[Tensor, "points models"], second: Float[Tensor, "points models"], compat: Compat
) -> Float[Tensor, " points"]:
    low = torch.minimum(first.amin(1), second.amin(1)).numpy()
    high = torch.maximum(first.amax(1), second.amax(1)).numpy()
    if compat != "direct":
        high = np.where(high > low, high, low + 1)
    bins = BINS - 1 if compat == "direct" else BINS
    edges = torch.from_numpy(np.linspace(low, high, bins + 1, axis=1)).contiguous()
    p, q = (_counts(values, edges, closed=compat == "closed") for values in (first, second))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    if compat == "direct":
        # that code counts a bin below the range, too, which is always empty
        q = torch.cat([q, torch.zeros_like(q[:, :1])], 1).clamp_min(LEAST)
        q = (q / q.sum(1, keepdim=True))[:, :-1]
    else:
        q = torch.where(p > 0, q.nan_to_num(0.0).clamp_min(LEAST), q.nan_to_num(0.0))
    if compat == "bench":
        q = q / q.sum(1, keepdim=True)
    value = torch.special.xlogy(p, p / torch.where(p > 0, q, 1)).sum(1)
    return value.nan_to_num(0.0) if compat == "easydub" else value


def _counts(
    values: Float[Tensor, "points models"], edges: Float[Tensor, "points edges"], *, closed: bool
) -> Float[Tensor, "points bins"]:
    """How many of each point's values are in each bin."""
    points, bins = len(values), edges.shape[1] - 1
    place = torch.searchsorted(edges, values.contiguous(), right=True) - 1
    place = place.clamp_max(bins - 1) if closed else place
    flat = (torch.arange(points)[:, None] * (bins + 1) + place).flatten()
    return torch.bincount(flat, minlength=points * (bins + 1)).view(points, bins + 1)[:, :bins].double()


def _check(unlearned: Tensor, oracle: Tensor) -> None:
    for name, margins in (("unlearned", unlearned), ("oracle", oracle)):
        if margins.ndim != 2 or len(margins) < 2 or not margins.shape[1]:
            raise PalimpsestError(
                f"{name} margins have shape {list(margins.shape)}, expected [models, points] with at least two models."
            )
        if torch.isnan(margins).any():
            model, point = torch.isnan(margins).nonzero()[0].tolist()
            raise PalimpsestError(f"the {name} margin of point {point} is NaN under model {model}.")
    if unlearned.shape != oracle.shape:
        raise PalimpsestError(
            f"unlearned margins have shape {list(unlearned.shape)}, those of oracles {list(oracle.shape)}: expected as "
            "many models of either kind, and the same points."
        )


def noise_floor(models: int, points: int = 2000, seed: int = 0) -> Float[Tensor, " points"]:
    """KLoM of points whose margins are Gaussian with the same mean and spread under both kinds of models."""
    draws = torch.randn(2, models, points, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return klom(draws[0], draws[1])


@dataclasses.dataclass(frozen=True)
class Summary:
    """KLoM of a group of points, nats; `floor` is the 95th percentile of oracles against other oracles."""

    mean: float
    median: float
    p95: float
    floor: float
    points: int
    maximum: float = MAXIMUM


def klom_by_group(
    unlearned: Float[Tensor, "models points"],
    oracle: Float[Tensor, "models points"],
    groups: Mapping[str, Sequence[int] | Int[Tensor, " group"]],
    *,
    others: Float[Tensor, "models points"] | None = None,
    compat: Compat = "closed",
    warn: Callable[[str], None] | None = None,
) -> dict[str, Summary]:
    """KLoM of each group of points (forget, retain, validation); `others` are oracles of other seeds, for the floor.

    Without `others` the floor is that of Gaussian margins. Few models make `warn` say so.
    """
    values = klom(unlearned, oracle, compat)
    floor = noise_floor(len(oracle)) if others is None else klom(others, oracle, compat)
    found = {}
    for name, chosen in groups.items():
        places = torch.as_tensor(chosen, dtype=torch.long)
        if not len(places):
            raise PalimpsestError(f"the group {name} has no point.")
        if int(places.min()) < 0 or int(places.max()) >= len(values):
            raise PalimpsestError(f"the group {name} names a point outside 0 to {len(values) - 1}.")
        own = values[places]
        below = float((floor if others is None else floor[places]).quantile(0.95))
        mean, median, p95 = float(own.mean()), float(own.median()), float(own.quantile(0.95))
        found[name] = Summary(mean, median, p95, below, len(own))
    if warn is not None and len(oracle) < FEW:
        least = noise_floor(len(oracle)).median()
        warn(f"KLoM of {len(oracle)} models is {float(least):.2f} even where nothing differs; take at least 100.")
    return found
