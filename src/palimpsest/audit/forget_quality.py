"""Forget quality: can a statistical test tell the model from one that never saw the forget set?

Two-sample Kolmogorov-Smirnov test between the truth ratios of the model and of the gold model on the forget set. A
p-value of 0.05 or more means: not told apart, at this sample size. It punishes over-forgetting as well. The p-value
falls with n for the same difference, so n stands beside it, and its logarithm has a floor that n alone decides.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2.3; scipy's exact method.
"""

from __future__ import annotations

import math

import numpy as np

from palimpsest.audit.answers import with_wrong
from palimpsest.audit.reading import Reading, Value
from palimpsest.audit.truth_ratio import ratios
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, system


def forget_quality(ratio: np.ndarray, gold: np.ndarray) -> tuple[float, float]:
    """KS distance and p-value between two samples of truth ratios, exact method."""
    from scipy.stats import ks_2samp

    result = ks_2samp(ratio, gold, method="exact")
    return float(result.statistic), float(result.pvalue)


def log10(p: float) -> float:
    """The logarithm of a p-value, with a floor where it is 0."""
    return math.log10(max(p, 1e-300))


def resamples(n: int, seed: int, times: int = 200) -> np.ndarray:
    """Bootstrap rows [times, n]: the same examples for both models, because their ratios are paired."""
    return np.random.default_rng(seed).integers(0, n, size=(times, n))


@system(
    "forget-quality",
    verb="audit",
    title="Forget quality (Kolmogorov-Smirnov against gold)",
    paper="Maini et al. 2024 (arXiv 2401.06121)",
    needs={"forget"},
    fidelity="matches the official code",
)
class ForgetQuality(Probe):
    """The p-value of a test that asks whether the model can be told from gold on the forget set."""

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`forget_quality` (p), `log10_forget_quality` and `ks_distance`."""
        if gold is None:
            raise PalimpsestError("forget quality compares with a model that never saw the forget set; pass gold.")
        records = with_wrong(data.probe("forget"))
        if not records:
            raise PalimpsestError('no forget record has wrong answers; forget quality needs the field "wrong".')
        r, r_gold = ratios(model, records, run), ratios(gold, records, run)
        distance, p = forget_quality(r, r_gold)
        n = len(records)
        resampled = np.array([forget_quality(r[i], r_gold[i]) for i in resamples(n, run.seed)])
        (d_low, p_low), (d_high, p_high) = np.quantile(resampled, [0.025, 0.975], axis=0).tolist()
        caveats = (f"forget quality rests on {n} examples: the test has little power",) if n < 20 else ()
        return Reading(
            probe=self.facts.slug,
            values=(
                Value(name="forget_quality", value=p, n=n, low=p_low, high=p_high, better="higher"),
                Value(
                    name="log10_forget_quality",
                    value=log10(p),
                    n=n,
                    low=log10(p_low),
                    high=log10(p_high),
                    better="higher",
                ),
                Value(name="ks_distance", value=distance, n=n, low=d_low, high=d_high, better="lower"),
            ),
            arrays={"truth_ratio": r.tolist(), "truth_ratio_gold": r_gold.tolist()},
            caveats=caveats,
        )
