"""Curvature bands: do some records live in directions of a layer's input that most data hardly uses?

The eigenvectors of a layer's input second moment, taken over reference data and ordered by eigenvalue, are cut into
bands. In each band the activations of a role are compared with those of the reference. What was learned by heart, and
facts recalled without a context, stand out in the low bands: they are what `loss-curvature` takes away first.

Source: Merullo et al. 2025 (arXiv 2510.24256), the activation analysis. There the bands follow the K-FAC curvature of
pairs of directions; over input directions alone that order is the one of the eigenvalues.

    A = V diag(mu) V^T   mean of a a^T over the reference   [in, in]
    ratio(role, band)    mean over positions of |V_band^T a| on the role / the same on the reference
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.audit.reading import Reading, mean_value
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.curvature import eigenbasis, input_grams, linear_layers
from palimpsest.statistics.examples import Examples, evaluating
from palimpsest.system import Probe, setting, system

BANDS = {"top 10 %": (0.0, 0.1), "10 to 25 %": (0.1, 0.25), "25 to 50 %": (0.25, 0.5), "bottom 50 %": (0.5, 1.0)}
"""Shares of the eigenvectors, the largest eigenvalue first."""


def band_edges(width: int) -> list[tuple[int, int]]:
    """First and last-but-one eigenvector of each band; every band has at least one where the width allows it."""
    if width < len(BANDS):
        raise PalimpsestError(f"a layer with {width} inputs cannot be cut into {len(BANDS)} bands.")
    cuts = [max(i, round(low * width)) for i, (low, _) in enumerate(BANDS.values())]
    return list(zip(cuts, [*cuts[1:], width], strict=True))


@torch.no_grad()
def band_norms(
    model: Model, records: Sequence[Any], bases: Mapping[str, Float[Tensor, "in in"]], run: Run, batch_size: int = 32
) -> dict[str, Float[Tensor, " bands"]]:
    """Mean norm of the activations in each band of each layer, over all positions of the records."""
    modules = linear_layers(model, list(bases))
    examples = Examples(model, records, warn=run.warn)
    sums = {name: torch.zeros(len(BANDS), dtype=torch.float64, device=model.device) for name in bases}
    counts = dict.fromkeys(bases, 0)

    def receive(call: Call, output: Any) -> None:
        a = call.input.reshape(-1, call.input.shape[-1])
        if batch.real is not None and batch.real.numel() == len(a):
            a = a[batch.real.flatten()]
        squares = (a.to(bases[call.key]) @ bases[call.key]).square()
        edges = band_edges(squares.shape[1])
        sums[call.key] += torch.stack([squares[:, low:high].sum(1).sqrt().sum() for low, high in edges])
        counts[call.key] += len(a)

    with evaluating(model.network), watch(modules, forward=receive):
        for group in run.track(examples.groups(batch_size), "bands"):
            batch = examples.batch(group)
            batch.visit(model.network)
    return {name: sums[name] / counts[name] for name in bases}


@system(
    "curvature-bands",
    verb="audit",
    title="Activation by curvature band",
    paper="Merullo et al. 2025 (arXiv 2510.24256)",
    takes="causal-lm or classifier",
    needs={"forget"},
    uses={"train", "general", "retain", "world", "real"},
    fidelity="paper only",
    deviations=("bands of input directions alone; the paper orders pairs of input and output directions",),
)
class CurvatureBands(Probe):
    """How much more a role uses the rarely used directions of the MLPs' inputs than the reference does."""

    reference: Literal["auto", "train", "general", "retain"] = setting(
        default="auto", origin="paper: clean text", help="role compared with; auto: the first given of general, retain"
    )
    matrices: tuple[str, ...] = setting(default=("mlp_up",), origin="paper", help="roles or name patterns")

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`ratio/<role>/<band>`, a mean over layers, for each other role that is given."""
        reference = self._reference(data)
        grams = input_grams(model, data[reference], self.matrices, run)
        bases = {name: eigenbasis(gram.matrix / gram.positions)[1] for name, gram in grams.items()}
        usual = band_norms(model, data[reference], bases, run)
        values, arrays = [], {}
        for role in ("forget", "retain", "world", "real", "general"):
            records: list[Record] = data.probe(role)
            if not records or role == reference:
                continue
            own = band_norms(model, records, bases, run)
            ratios = torch.stack([own[name] / usual[name].clamp_min(1e-12) for name in bases]).double().numpy()
            for i, band in enumerate(BANDS):
                name = f"ratio/{role}/{band}"
                arrays[name] = ratios[:, i].tolist()
                values.append(mean_value(name, ratios[:, i], seed=run.seed))
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays)

    def _reference(self, data: Roles) -> str:
        wanted = ("general", "retain") if self.reference == "auto" else (self.reference,)
        for role in wanted:
            if role in data:
                return role
        raise PalimpsestError(f"curvature-bands compares with the role {' or '.join(wanted)}, which is not given.")
