"""Balanced subnet: learn which weights of the MLPs to switch off so that given texts go and the others stay.

Every weight has a score; those with the smallest are off. Only the scores learn, by gradient descent straight through
the selection, up the loss of what is to go and down that of what is to stay. The weights that remain keep their values.
It needs both sets, unlike `loss-curvature`, whose baseline it is, and hurts what it was not shown less. On a classifier
a text is an image, and its one token the label; the published experiments are on language models.

Source: Sakarvadia et al. 2025 (arXiv 2410.02159) and the authors' code; step size and share as Merullo et al. 2025
(arXiv 2510.24256) chose them. Differs: a step with texts of one kind only has no term for the other (the code's is a
mean of nothing), and it must be the same share of every matrix, of experts each their own. Where there are no MLPs, the
convolutions are masked.

    theta      weight of an MLP matrix, fixed
    s          score of each weight, Kaiming-uniform with a = sqrt 5 at first
    r          ratio, share of a matrix that is switched off
    m          mask: 0 for the share r of smallest |s| of the matrix, else 1; d m / d|s| is taken to be 1
    A_f, A_r   mean negative log-likelihood a token of a forget and of a retain text, nats, under theta * m

    minimise over s:   -(1 - w) mean A_f + w mean A_r
    theta <- theta * m
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


def mask(scores: Float[Tensor, "*weight"], ratio: float) -> Float[Tensor, "*weight"]:
    """m: 0 for the given share of smallest |s| of each matrix; its gradient passes to |s| as if m were |s|.

    Three dimensions are [experts, out, in], each expert a matrix; of a convolution all is one.
    """
    size = scores.detach().abs()
    size = size.flatten(-2) if size.ndim == 3 else size.flatten()
    off = round(ratio * size.shape[-1])
    on = torch.ones_like(size).scatter_(-1, size.argsort(-1)[..., :off], 0.0).view_as(scores)
    return on + (scores.abs() - scores.detach().abs())


class Masked(nn.Module):
    """A weight times its mask; a parametrisation of torch."""

    def __init__(self, weight: Tensor, ratio: float, generator: torch.Generator) -> None:
        super().__init__()
        inputs = weight[0].numel() if weight.ndim == 4 else weight.shape[-1]
        bound = 1 / math.sqrt(inputs)  # Kaiming-uniform with a = sqrt 5
        drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
        self.scores = nn.Parameter(drawn.to(weight.device))
        self.ratio = ratio

    def forward(self, weight: Tensor) -> Tensor:
        """theta * m."""
        return weight * mask(self.scores, self.ratio).to(weight.dtype)


@system(
    "balanced-subnet",
    verb="erase",
    title="Balanced subnet (BSN)",
    paper="Sakarvadia et al. 2025 (arXiv 2410.02159)",
    takes="causal-lm or classifier",
    needs={"forget", "retain"},
    fidelity="matches the official code",
    deviations=(
        "a step without texts of one kind has no term for it",
        "classifiers, and convolutions where there are no MLPs, are ours",
    ),
)
class BalancedSubnet(Method):
    """Switches off the MLP weights whose absence costs the forget set most and the retain set least."""

    ratio: float = setting(
        default=0.0015, above=0, below=1, origin="Merullo et al. 2025", help="share of each matrix that is switched off"
    )
    retain_weight: float = setting(
        default=0.05, at_least=0, at_most=1, origin="official code; Merullo et al.: 0.7", help="w"
    )
    training: Training = setting(
        default=Training(
            learning_rate=0.1, epochs=5, batch_size=64, weight_decay=5e-4, warmup_epochs=0.0, decay="constant"
        ),
        origin="official code",
        help="how the scores learn, by gradient descent with momentum 0.9",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model without the weights that were switched off."""
        if self.training.lora_rank:
            raise PalimpsestError("balanced-subnet trains scores, which adapters have none of: set lora_rank to 0.")
        plan = schedule(model, self.training, run, pooled=True, forget=data.forget, retain=data.retain)
        student = model if run.in_place else model.copy()
        weights = self._attach(student, run)
        # torch gives a parametrised module a class of its own, which no checkpoint can be read into
        whole = run.replace(in_place=True, folder=None)
        done = False
        try:
            trained = train(
                student, plan, self._objective, self.training, whole, trainable=_is_score, optimizer=_descent
            )
            done = True
        finally:
            for module, name in weights:
                parametrize.remove_parametrizations(module, name, leave_parametrized=done)
                module.get_parameter(name).requires_grad_(True)
        run.note(switched_off=self.ratio, matrices=len(weights))
        return trained

    def _attach(self, student: Model, run: Run) -> list[tuple[nn.Module, str]]:
        """Gives every matrix its scores."""
        draw, places = run.generator(), anatomy(student.network)
        found = dict.fromkeys(  # a shared expert is a part of its own inside the layer's MLP: once is enough
            (part.module.get_submodule(path), name)
            for part in places.select("mlp" if places.find("mlp") else "convolution").parts
            for path, _, name in (parameter.rpartition(".") for parameter in part.parameters)
            if part.module.get_parameter(f"{path}.{name}".lstrip(".")).ndim > 1
        )
        for module, name in found:
            parametrize.register_parametrization(
                module, name, Masked(module.get_parameter(name), self.ratio, draw), unsafe=True
            )
        return list(found)

    def _objective(self, batch: Batch) -> Float[Tensor, ""]:
        loss = torch.zeros(())
        if "forget" in batch:
            loss = loss - (1 - self.retain_weight) * batch.forget.mean_examples(batch.forget.mean_nll)
        if "retain" in batch:
            loss = loss + self.retain_weight * batch.retain.mean_examples(batch.retain.mean_nll)
        return loss


def _is_score(name: str) -> bool:
    return name.endswith(".scores")


def _descent(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    scores = [weight for name, weight in network.named_parameters() if _is_score(name)]
    return torch.optim.SGD(scores, lr=training.learning_rate, momentum=0.9, weight_decay=training.weight_decay)
