"""Model utility: the harmonic mean of nine measures of what the model should still do.

{retain, real, world} x {answer probability, ROUGE-L recall, truth ratio}. One ruined measure ruins the mean: that is
its point. Where the data lacks one of the sets the mean is over fewer, and the reading says over how many.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 2.2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palimpsest.audit.answer_probability import probabilities
from palimpsest.audit.answers import asked, with_wrong
from palimpsest.audit.reading import Reading, Value, mean_value
from palimpsest.audit.rouge_recall import recalls
from palimpsest.audit.truth_ratio import aggregate, ratios
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, setting, system

SETS = ("retain", "real", "world")


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean; zero where any value is zero."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


@system(
    "model-utility",
    verb="audit",
    title="Model utility",
    paper="Maini et al. 2024 (arXiv 2401.06121)",
    uses={"retain", "real", "world"},
    fidelity="matches the official code",
    deviations=("the truth ratio of the utility sets takes the geometric mean, as the paper; its code the arithmetic",),
)
class ModelUtility(Probe):
    """The harmonic mean of probability, ROUGE-L recall and truth ratio over retain, real and world."""

    max_new_tokens: int = setting(default=200, at_least=1, origin="paper", help="longest answer, tokens")

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`model_utility` with a bootstrap interval that resamples the examples of every set."""
        samples: dict[str, np.ndarray] = {}
        for role in SETS:
            if records := asked(data.probe(role)):
                samples[f"probability/{role}"] = probabilities(model, records, run)
                samples[f"rouge/{role}"] = recalls(model, records, run, self.max_new_tokens)
            if records := with_wrong(data.probe(role)):
                samples[f"truth_ratio/{role}"] = aggregate(ratios(model, records, run), role)
        if not samples:
            raise PalimpsestError("model utility needs questions in at least one of the roles retain, real, world.")
        point = harmonic_mean([float(x.mean()) for x in samples.values()])
        rng = np.random.default_rng(run.seed)
        means = [rng.choice(x, size=(1000, len(x))).mean(1) for x in samples.values()]
        resampled = [harmonic_mean(column) for column in np.stack(means, axis=1).tolist()]
        low, high = np.quantile(resampled, [0.025, 0.975])
        n = min(len(x) for x in samples.values())
        value = Value(name="model_utility", value=point, n=n, low=float(low), high=float(high), better="higher")
        parts = tuple(mean_value(f"part/{name}", x, better="higher", seed=run.seed) for name, x in samples.items())
        missing = 9 - len(samples)
        caveats = (f"model utility is the harmonic mean of {len(samples)} measures instead of 9",) if missing else ()
        return Reading(probe=self.facts.slug, values=(value, *parts), caveats=caveats)
