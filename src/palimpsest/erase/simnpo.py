"""SimNPO: negative preference optimisation without a reference model, on length-normalised likelihoods.

NPO measures the push against the model as given, which spends it unevenly: answers that the model knew best, and long
ones, get most. SimNPO replaces the reference by a constant margin and divides by the answer's length. Use it where
answers differ much in length or the model as given is not at hand.

Source: Fan et al. 2024 (arXiv 2410.07163), eq. 4, and the authors' code; defaults of OpenUnlearning. The paper writes
the margin outside the product: its gamma is beta * delta here.

    A      mean_nll  [batch]  negative log-likelihood a token of each forget answer, nats
    beta                      how fast the push fades
    delta                     margin, nats a token
    gamma  forget_weight
    alpha  retain_weight

    L = gamma (2 / beta) mean softplus(-beta (A - delta))  +  alpha CE(retain)
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.records import Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


def simnpo_loss(mean_nll: Float[Tensor, " batch"], beta: float, delta: float) -> Float[Tensor, ""]:
    """Fan et al. 2024, eq. 4."""
    return 2 / beta * F.softplus(-beta * (mean_nll - delta)).mean()


@system(
    "simnpo",
    verb="erase",
    title="SimNPO",
    paper="Fan et al. 2024 (arXiv 2410.07163)",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="matches the official code",
)
class SimNPO(Method):
    """Pushes the length-normalised forget likelihoods down to a margin, and holds `retain`."""

    beta: float = setting(
        default=4.5, above=0, origin="OpenUnlearning; authors' TOFU forget05: 2.5", help="how fast the push fades"
    )
    delta: float = setting(default=0.0, at_least=0, origin="OpenUnlearning", help="margin, nats a token")
    forget_weight: float = setting(default=0.125, above=0, origin="OpenUnlearning; authors: 0.1375", help="gamma")
    retain_weight: float = setting(default=1.0, at_least=0, origin="OpenUnlearning", help="alpha")
    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the push."""
        plan = schedule(model, self.training, run, forget=data.forget, retain=data.retain)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            forgetting = simnpo_loss(batch.forget.mean_nll, self.beta, self.delta)
            return self.forget_weight * forgetting + self.retain_weight * batch.retain.cross_entropy

        return train(model, plan, objective, self.training, run)
