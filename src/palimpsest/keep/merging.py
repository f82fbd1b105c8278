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

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.keep.lines import FAR, TaskVectors, check_words, factors, norm, place, start_of
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.batch_norm import recompute_averages
from palimpsest.system import Method, configuration, setting, system

Rule = Literal["average", "arithmetic", "ties", "consensus"]
ALIKE = 0.95
"""Cosine of two task vectors above which they hardly come from the start that is named."""


def smallest_kept(parts: Iterable[Float[Tensor, "*weight"]], density: float) -> float:
    """The size of the smallest entry that stays where the largest share `density` of a vector, given in parts, does."""
    sizes = np.concatenate([part.abs().flatten().cpu().numpy() for part in parts])
    dropped = len(sizes) - int(density * len(sizes))
    if dropped == len(sizes):
        return float("inf")
    # only one place of the order is needed: peft's prune sorts, which takes three times as long for a whole model
    sizes.partition(dropped)
    return float(sizes[dropped])


def ties(
    vectors: Float[Tensor, tasks * weight], smallest: Float[Tensor, " tasks"] | None = None
) -> Float[Tensor, "*weight"]:
    """Elects a sign and averages what agrees, of the entries that stay; entries of opposite equals are +."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    if smallest is not None:
        vectors = vectors * (vectors.abs() >= smallest.view(-1, *[1] * (vectors.ndim - 1)))
    return disjoint_merge(vectors, calculate_majority_sign_mask(vectors, method="total"))


def consensus_mask(
    vectors: Float[Tensor, tasks * weight], merged: Float[Tensor, "*weight"], scale: float, least: int = 2
) -> Bool[Tensor, "*weight"]:
    """Which weights at least so many tasks want: where a task's own change outweighs what the others add to it."""
    wanted = vectors.abs() > (merged - vectors).abs() * scale
    return wanted.sum(0) >= least


@configuration("ties", title="TIES merging", paper="Yadav et al. 2023 (arXiv 2306.01708)", preset={"rule": "ties"})
@system(
    "task-arithmetic",
    verb="keep",
    title="Task arithmetic",
    paper="Ilharco et al. 2023 (arXiv 2212.04089)",
    takes="causal-lm or classifier",
    uses={"train"},
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
        others = [load(source, run=run) for source in self.models]
        for other in others:
            check_words(before, other)
        vectors = TaskVectors(before.network, [each.network for each in (model, *others)])
        smallest = self._smallest(vectors)
        found = _Measured(len(vectors.tuned))
        for name in run.track(list(vectors), "comparing"):
            found.add(vectors[name], self._merged(vectors[name], smallest))
        self._report(found, before, run)
        edited = model if run.in_place else model.copy()
        by: Mapping[str, float] = dict.fromkeys(vectors, self.scale)
        if self.layer_scaling:
            alpha = found.common_scale if self.alpha is None else self.alpha
            run.note(alpha=alpha)
            by = factors(edited.network, alpha, self.scale)
        place(edited.network, before.network, lambda name: self._merged(vectors[name], smallest), by)
        recompute_averages(edited, data, run, self.facts.slug)
        return edited

    def _smallest(self, vectors: TaskVectors) -> Float[Tensor, " tasks"] | None:
        """What TIES keeps of each vector, over the whole network."""
        if self.rule != "ties" or self.density >= 1:
            return None
        tasks = range(len(vectors.tuned))
        return torch.tensor([smallest_kept((vectors.one(n, task) for n in vectors), self.density) for task in tasks])

    def _merged(
        self, vectors: Float[Tensor, tasks * weight], smallest: Float[Tensor, " tasks"] | None
    ) -> Float[Tensor, "*weight"]:
        if self.rule == "average":
            return vectors.mean(0)
        if self.rule == "ties":
            return ties(vectors, smallest)
        total = vectors.sum(0)
        return total * consensus_mask(vectors, total, self.mask_scale) if self.rule == "consensus" else total

    def _report(self, found: _Measured, before: Model, run: Run) -> None:
        reach = norm(before.network.parameters())
        for name, size in zip(("the model", *self.models), found.norms.tolist(), strict=True):
            if size > FAR * reach:
                far = f"{name} is {size / reach:.2f} of the base's norm away from it"
                run.warn(f"{self.facts.slug}: {far}: did it start there?")
        if len(found.norms) < 2:
            return
        cosines = found.cosines
        run.note(cosines=cosines, sign_conflicts=found.opposed / found.weights)
        if float((cosines - torch.eye(len(cosines))).max()) > ALIKE:
            run.warn(
                f"{self.facts.slug}: two task vectors have a cosine above {ALIKE}: is the base their common start?"
            )


class _Measured:
    """What is told of task vectors and of what a rule makes of them, weight after weight, summed in float64."""

    def __init__(self, tasks: int) -> None:
        self.products = torch.zeros(tasks, tasks, dtype=torch.float64)
        self.opposed = self.weights = 0
        self.sizes = torch.zeros(2, dtype=torch.float64)

    def add(self, vectors: Float[Tensor, tasks * weight], merged: Float[Tensor, "*weight"]) -> None:
        """One weight more."""
        flat = vectors.flatten(1)
        self.products += (flat @ flat.mT).to(self.products)
        self.opposed += int(((flat.amax(0) > 0) & (flat.amin(0) < 0)).sum())
        self.weights += flat.shape[1]
        self.sizes += torch.stack([flat.sum(0).abs().sum(), merged.abs().sum()]).to(self.sizes)

    @property
    def norms(self) -> Float[Tensor, " tasks"]:
        """L2 norms of the task vectors."""
        return self.products.diagonal().sqrt()

    @property
    def cosines(self) -> Float[Tensor, "tasks tasks"]:
        """Cosines of the task vectors."""
        size = self.norms.clamp_min(1e-30)
        return (self.products / torch.outer(size, size)).float()

    @property
    def common_scale(self) -> float:
        """alpha of LiNeS: how much larger the plain sum is than what the rule made of it, over the tasks."""
        return float(self.sizes[0] / self.sizes[1]) / len(self.products)
