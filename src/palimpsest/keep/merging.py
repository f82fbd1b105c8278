"""Merging: one model out of several that were fine-tuned from the same start, without training.

The differences to the common start (task vectors) are added up. Where tasks pull a weight in opposite directions they
interfere: TIES keeps the large changes and one sign, consensus keeps weights that several tasks want, and LiNeS
(`layer_scaling`) damps the shallow layers, where tasks interfere most. With one model, task arithmetic is WiSE-FT.

Source: task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089); TIES, Yadav et al. 2023 (arXiv 2306.01708), signs and
means by peft; consensus, Wang et al. 2024 (arXiv 2405.07813); LiNeS, Wang et al. 2025 (arXiv 2410.17146) and its code.

    tau_i     task vector of model i   [weights]
    g         average  (1/N) sum tau_i        arithmetic  sum tau_i        ties  on the whole flat vector
    m_i       |tau_i| > |g - tau_i| s                                      s: mask_scale
    consensus g where at least two m_i are 1, else 0                       g: sum
    lambda_l  scale, or with layer_scaling  alpha + scale (l - 1) / (L - 1),  alpha = |sum tau_i|_1 / (N |g|_1)

    theta  <- theta_0 + lambda_l g
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.keep.lines import check_words, distance, factors, place, start_of, task_vector
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, configuration, setting, system

Rule = Literal["average", "arithmetic", "ties", "consensus"]
ALIKE = 0.95
"""Cosine of two task vectors above which they hardly come from the start that is named."""


def trimmed(vector: Float[Tensor, " weights"], density: float) -> Float[Tensor, " weights"]:
    """The largest entries, a share `density` of all and what equals the smallest of them; others are 0."""
    size = vector.abs()
    dropped = len(size) - int(density * len(size))
    if dropped == len(size):
        return torch.zeros_like(vector)
    # only one place of the order is needed: peft's prune sorts, which takes three times as long for a whole model
    least = float(np.partition(size.float().cpu().numpy(), dropped)[dropped])
    return vector * (size >= least)


def ties(vectors: Float[Tensor, "tasks weights"], density: float) -> Float[Tensor, " weights"]:
    """Trim all but the largest share of each, elect a sign, average what agrees; entries of opposite equals are +."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    large = vectors if density >= 1 else torch.stack([trimmed(vector, density) for vector in vectors])
    return disjoint_merge(large, calculate_majority_sign_mask(large, method="total"))


def consensus_mask(
    vectors: Float[Tensor, "tasks weights"], merged: Float[Tensor, " weights"], scale: float, least: int = 2
) -> Bool[Tensor, " weights"]:
    """Which weights at least so many tasks want: where a task's own change outweighs what the others add to it."""
    wanted = vectors.abs() > (merged - vectors).abs() * scale
    return wanted.sum(0) >= least


def common_scale(vectors: Float[Tensor, "tasks weights"], merged: Float[Tensor, " weights"]) -> float:
    """alpha of LiNeS: by how much the plain sum is larger than what the rule made of it, over the number of tasks."""
    return float(vectors.sum(0).abs().sum(dtype=torch.float64) / merged.abs().sum(dtype=torch.float64)) / len(vectors)


@configuration("ties", title="TIES merging", paper="Yadav et al. 2023 (arXiv 2306.01708)", preset={"rule": "ties"})
@system(
    "task-arithmetic",
    verb="keep",
    title="Task arithmetic",
    paper="Ilharco et al. 2023 (arXiv 2212.04089)",
    takes="causal-lm or classifier",
    fidelity="matches the official code",
    deviations=(
        "TIES keeps the stated share of weights; the authors' code keeps one weight more",
        "the scale of the consensus masks is one setting; the authors' code chooses it for every task",
    ),
)
class Merge(Method):
    """Adds up what the model and others learned from the same start."""

    models: tuple[str, ...] = setting(
        default=(), origin="ours", help="folders or hub names of the other fine-tuned models"
    )
    base: str | None = setting(default=None, origin="the ledger", help="the common start; None: the ledger's source")
    rule: Rule = setting(default="arithmetic", origin="paper", help="how task vectors are put together")
    scale: float = setting(default=0.4, at_least=0, origin="paper: chosen on validation data", help="lambda")
    density: float = setting(default=0.2, above=0, at_most=1, origin="TIES", help="share of weights that TIES keeps")
    mask_scale: float = setting(default=0.4, above=0, origin="official code: 0.2 to 0.6", help="s of the masks")
    layer_scaling: bool = setting(default=False, origin="LiNeS", help="scale with depth")
    alpha: float | None = setting(
        default=None, at_least=0, origin="LiNeS", help="lambda of the first block; None: from the sizes of the vectors"
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The merged model; its ledger entry has the cosines of the task vectors."""
        from palimpsest.models.loading import load

        if self.rule == "consensus" and not self.models:
            raise PalimpsestError("consensus needs at least two models: name the others in models.")
        before = start_of(model, self.base, run, self.facts.slug)
        vectors = [task_vector(before.network, model.network)]
        for source in self.models:
            other = load(source, run=run)
            check_words(before, other)
            vectors.append(task_vector(before.network, other.network))
        for name, vector in zip(("the model", *self.models), vectors, strict=True):
            if (far := distance(vector, before.network)) > 0.5:
                run.warn(f"{self.facts.slug}: {name} is {far:.2f} of the base's norm away from it: did it start there?")
        names = list(vectors[0])
        flat = torch.stack([torch.cat([vector[name].flatten() for name in names]) for vector in vectors])
        merged = self._merged(flat)
        sizes = [vectors[0][name].numel() for name in names]
        made = {name: part.view_as(vectors[0][name]) for name, part in zip(names, merged.split(sizes), strict=True)}
        edited = model if run.in_place else model.copy()
        alpha = common_scale(flat, merged) if self.alpha is None else self.alpha
        by: Mapping[str, float] = dict.fromkeys(names, self.scale)
        if self.layer_scaling:
            by = factors(edited.network, alpha, self.scale)
        place(edited.network, before.network, made, by)
        self._report(flat, alpha, run)
        return edited

    def _merged(self, flat: Float[Tensor, "tasks weights"]) -> Float[Tensor, " weights"]:
        if self.rule == "average":
            return flat.mean(0)
        if self.rule == "ties":
            return ties(flat, self.density)
        total = flat.sum(0)
        return total * consensus_mask(flat, total, self.mask_scale) if self.rule == "consensus" else total

    def _report(self, flat: Float[Tensor, "tasks weights"], alpha: float, run: Run) -> None:
        if len(flat) < 2:
            return
        size = flat.norm(dim=1).clamp_min(1e-30)
        cosines = flat @ flat.mT / torch.outer(size, size)
        opposed = ((flat.amax(0) > 0) & (flat.amin(0) < 0)).float().mean()
        run.note(cosines=cosines, sign_conflicts=float(opposed), **({"alpha": alpha} if self.layer_scaling else {}))
        if float((cosines - torch.eye(len(flat))).max()) > ALIKE:
            run.warn(
                f"{self.facts.slug}: two task vectors have a cosine above {ALIKE}: is the base their common start?"
            )
