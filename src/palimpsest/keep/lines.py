"""LiNeS: give back to the shallow layers what fine-tuning took from them, and leave the deep ones their change.

Fine-tuning moves all layers, but most of the damage to what the model knew before is done in the shallow ones, where
the new task gains little. The difference to the model before is multiplied by a number that grows linearly with depth.
No training, no gradient; with `alpha="auto"`, one number is chosen on validation data. Use it after any fine-tuning
whose start is still at hand. `wise-ft` is the same number for all layers.

Source: Wang et al. 2025 (arXiv 2410.17146) and the authors' code; WiSE-FT: Wortsman et al. 2022 (arXiv 2109.01903).
Differs: blocks come from the anatomy of the network; the code takes the first number in a name for the block.

    theta_0       base                 the model before
    tau           task vector          theta - theta_0, in float32, weights alone
    l             1 .. L               block in order of execution
    alpha, beta                        factors of the first block, and what the last one has more

    lambda_l = alpha + beta (l - 1) / (L - 1)
    theta   <- theta_0 + lambda_l tau      outside the blocks, the last norm and the head among it: alpha
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.audit.answers import answers
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.finite import is_finite
from palimpsest.guard import kind_of
from palimpsest.models.anatomy import anatomy
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.batch_norm import recompute_averages
from palimpsest.statistics.predictions import classify
from palimpsest.system import Method, configuration, setting, system

TRIED = tuple(i / 10 for i in range(11))
TARGET_WEIGHT = 2.0
"""How much more the new task counts than the control in choosing alpha, as in the code."""
FAR = 0.5
"""Norm of tau over that of theta_0 above which the base is hardly where the model came from."""


def coefficients(layers: int, alpha: float, beta: float) -> Float[Tensor, " layers"]:
    """lambda of each block."""
    if layers < 2:
        raise PalimpsestError(f"LiNeS needs at least 2 blocks to tell shallow from deep; the network has {layers}.")
    return alpha + beta * torch.arange(layers, dtype=torch.float64) / (layers - 1)


def factors(network: nn.Module, alpha: float, beta: float, reverse: bool = False) -> dict[str, float]:
    """lambda of every weight by name; `reverse` gives the deep blocks the small ones (a control)."""
    blocks = anatomy(network).blocks()
    of_block = coefficients(len(blocks), alpha, beta).tolist()
    of_block = of_block[::-1] if reverse else of_block
    inside = {name: value for block, value in zip(blocks, of_block, strict=True) for name in block.tensors()}
    return {name: inside.get(name, alpha) for name, _ in network.named_parameters()}


class TaskVectors(Mapping[str, Tensor]):
    """tau of several models, [models, *weight] by name, tied weights once; raises where their architectures differ.

    It holds the models alone: a difference is taken in float32 whenever its weight is asked for.
    """

    def __init__(self, base: nn.Module, tuned: Sequence[nn.Module]) -> None:
        self.base = dict(base.named_parameters())
        self.tuned = [dict(network.named_parameters()) for network in tuned]
        for end in self.tuned:
            for names, other, whose in ((self.base, end, "base"), (end, self.base, "model")):
                if lost := [name for name in names if name not in other]:
                    raise PalimpsestError(
                        f"only the {whose} has the weight {lost[0]}: the two have different architectures."
                    )
            for name, weight in self.base.items():
                if weight.shape != end[name].shape:
                    raise PalimpsestError(f"{name} is {list(end[name].shape)}, in the base {list(weight.shape)}.")

    def __getitem__(self, name: str) -> Tensor:
        """tau of the weight; raises where it has values that are not finite."""
        found = torch.stack([self.one(name, model) for model in range(len(self.tuned))])
        if not is_finite(found):
            raise PalimpsestError(f"{name} has values that are not finite.")
        return found

    def one(self, name: str, model: int) -> Tensor:
        """tau of the weight of one of the models."""
        return self.tuned[model][name].detach().float() - self.base[name].detach().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def task_vector(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """tau of one model by name, held in full."""
    return {name: vector[0] for name, vector in TaskVectors(base, [tuned]).items()}


@torch.no_grad()
def place(network: nn.Module, base: nn.Module, vector: Callable[[str], Tensor], by: Mapping[str, float]) -> None:
    """Sets the network's weights to theta_0 + lambda tau by name, one after the other, in place."""
    start = dict(base.named_parameters())
    for name, weight in network.named_parameters():
        weight.copy_(start[name].float() + by[name] * vector(name))


def start_of(model: Model, base: str | None, run: Run, by: str) -> Model:
    """The model before: the one that is named, or where the model came from by its ledger.

    Raises where that is not what stood before the last change: what was done in between would be undone, too.
    """
    from palimpsest.models.loading import is_start, load, load_start

    if not (source := base or model.ledger.source):
        raise PalimpsestError(f"{by}: the ledger does not say where this model started. Name the model before as base.")
    found = load(base, run=run) if base else load_start(source, by, run)
    made = model.ledger.made_by
    if base is None and made is not None and not is_start(found, made.weights_before):
        raise PalimpsestError(
            f"{by}: the ledger's start, {source}, is not the model before the last change ({made.method}). Name that "
            "as base, or the start itself to undo all changes since."
        )
    check_words(found, model)
    return found


def check_words(one: Model, other: Model) -> None:
    """Raises where the tokenizers know different words."""
    words = [m.tokenizer.get_vocab() for m in (one, other) if m.processor is not None and kind_of(m) != "classifier"]
    if len(words) == 2 and words[0] != words[1]:
        raise PalimpsestError("the two models have different tokenizers: their weights do not mean the same words.")


def norm(parts: Iterable[Tensor]) -> float:
    """L2 norm of all parts together, summed in float64."""
    return sum(float(part.detach().double().square().sum()) for part in parts) ** 0.5


def accuracy(model: Model, records: Sequence[Record], run: Run) -> float:
    """Share of right labels, or of answer tokens that are the most likely ones."""
    if kind_of(model) == "classifier":
        return float(classify(model, records, run).correct.float().mean())
    right = [float(a.correct.mean()) for a in answers(model, list(records), run)]
    return sum(right) / len(right)


@configuration(
    "wise-ft",
    title="WiSE-FT (weight interpolation)",
    paper="Wortsman et al. 2022 (arXiv 2109.01903)",
    preset={"schedule": "uniform"},
    deviations=(),
)
@system(
    "lines",
    verb="keep",
    title="Layer scaling after fine-tuning (LiNeS)",
    paper="Wang et al. 2025 (arXiv 2410.17146)",
    takes="causal-lm or classifier",
    uses={"validation", "general", "train"},
    fidelity="matches the official code",
    deviations=(
        "blocks come from the anatomy of the network; the code takes the first number in a weight's name",
        "to choose alpha, the accuracy of a language model is the share of answer tokens that are the most likely ones",
    ),
)
class LiNeS(Method):
    """Scales what fine-tuning changed, less in shallow layers than in deep ones."""

    base: str | None = setting(
        default=None, origin="the ledger", help="model before the fine-tuning; None: the ledger's source"
    )
    schedule: Literal["linear", "uniform", "reversed"] = setting(
        default="linear", origin="paper; its controls", help="how lambda goes with depth; uniform: alpha for all"
    )
    alpha: float | Literal["auto"] = setting(
        default=0.5,
        origin="paper: chosen on validation data",
        help="lambda of the first block; auto: the best of 0, 0.1, ... 1 on the roles validation and general",
    )
    beta: float | None = setting(
        default=None, at_least=0, origin="paper", help="what the last block has more; None: 1 - alpha"
    )

    def __post_init__(self) -> None:
        if self.alpha != "auto" and (isinstance(self.alpha, str | bool) or not 0 <= self.alpha < float("inf")):
            raise PalimpsestError(f"lines: alpha is {self.alpha!r}, expected a number of at least 0, or auto.")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The scaled model; its ledger entry has lambda and the norm of the change of each block."""
        before = start_of(model, self.base, run, self.facts.slug)
        vector = task_vector(before.network, model.network)
        if (far := norm(vector.values()) / norm(before.network.parameters())) > FAR:
            run.warn(f"lines: the model is {far:.2f} of the base's norm away from it: is that where it started?")
        edited = model if run.in_place else model.copy()

        def scaled(alpha: float) -> Model:
            place(edited.network, before.network, vector.__getitem__, self._factors(edited.network, alpha))
            recompute_averages(edited, data, run, self.facts.slug)
            return edited

        alpha = self._chosen(scaled, model.copy(), before, data, run) if self.alpha == "auto" else float(self.alpha)
        result = scaled(alpha)
        by = self._factors(edited.network, alpha)
        run.note(alpha=alpha, distance=far, **_by_block(edited.network, vector, by))
        return result

    def _factors(self, network: nn.Module, alpha: float) -> dict[str, float]:
        if self.schedule == "uniform":
            return {name: alpha for name, _ in network.named_parameters()}
        beta = max(0.0, 1 - alpha) if self.beta is None else self.beta
        return factors(network, alpha, beta, self.schedule == "reversed")

    def _chosen(self, scaled: Callable[[float], Model], tuned: Model, before: Model, data: Roles, run: Run) -> float:
        """The alpha whose model keeps most of both: the new task (validation) and the control (general)."""
        target, control = (data.require(role, by="lines with alpha auto") for role in ("validation", "general"))
        best, usual = accuracy(tuned, target, run), accuracy(before, control, run)
        for value, what in (
            (best, "the model tells nothing of validation"),
            (usual, "the base tells nothing of general"),
        ):
            if not value:
                raise PalimpsestError(f"lines: {what} right, so that there is nothing to keep. Set alpha.")
        scores = []
        for alpha in run.track(TRIED, "choosing alpha"):
            model = scaled(alpha)
            kept = accuracy(model, target, run) / best, accuracy(model, control, run) / usual
            scores.append(TARGET_WEIGHT * kept[0] + kept[1])
        run.note(alpha_score=scores)
        return TRIED[max(range(len(scores)), key=scores.__getitem__)]


def _by_block(network: nn.Module, vector: Mapping[str, Tensor], by: Mapping[str, float]) -> dict[str, Any]:
    """Curves over the blocks: lambda, and the norm of the change before it was scaled."""
    blocks = [list(block.tensors()) for block in anatomy(network).blocks()]
    return {
        "block_factor": [by[names[0]] for names in blocks],
        "block_change": [sum(float(vector[n].square().sum()) for n in names if n in vector) ** 0.5 for names in blocks],
    }
