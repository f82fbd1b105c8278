"""Negative preference optimisation (NPO): push the forget answers down, less and less as they go.

Gradient ascent has no floor: it goes on lowering an answer that is already gone until the model is wrecked. NPO weighs
the same gradient by how much is left to forget, so it fades out by itself. Use it when some retain data is at hand and
the forget set is more than a handful of records.

Source: Zhang et al. 2024 (arXiv 2404.05868), eq. 3, and the authors' code. Differs: the reference likelihoods are
computed once before training instead of by a second model at every step; the numbers are the same.

    S       nll            [batch]  summed negative log-likelihood of each forget answer, nats
    S_ref   reference_nll  [batch]  the same under the model as it was given
    beta                            how fast the push fades; beta -> 0 is gradient ascent

    L = (2 / beta) mean softplus(-beta (S - S_ref))  +  retain_weight R(retain)

On a classifier the answer is the label and S its cross-entropy.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.records import Roles
from palimpsest.erase.gradient_ascent import Leash, retain_loss
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


def npo_loss(nll: Float[Tensor, " batch"], reference_nll: Float[Tensor, " batch"], beta: float) -> Float[Tensor, ""]:
    """Zhang et al. 2024, eq. 3, on summed likelihoods."""
    return 2 / beta * F.softplus(-beta * (nll - reference_nll)).mean()


@system(
    "npo",
    verb="erase",
    title="Negative preference optimisation",
    paper="Zhang et al. 2024 (arXiv 2404.05868)",
    takes="causal-lm or classifier",
    needs={"forget"},
    uses={"retain"},
    fidelity="matches the official code",
    deviations=("the reference likelihoods are computed once before training",),
)
class NPO(Method):
    """Pushes the forget answers down relative to the model as given; holds `retain` where it is given."""

    beta: float = setting(default=0.1, above=0, origin="paper, section 4.1", help="how fast the push fades")
    retain: Leash = setting(default="cross-entropy", origin="OpenUnlearning", help="what holds the retained knowledge")
    forget_weight: float = setting(default=1.0, above=0, origin="OpenUnlearning", help="gamma")
    retain_weight: float = setting(default=1.0, at_least=0, origin="OpenUnlearning", help="alpha")
    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the push."""
        anchored = self.retain != "none" and "retain" in data
        plan = schedule(model, self.training, run, forget=data.forget, retain=data.retain if anchored else None)
        reference = sequence_nll(model, plan.sequences["forget"], run)
        hold = retain_loss(self.retain, model, plan, run) if anchored else None

        def objective(batch: Batch) -> Float[Tensor, ""]:
            loss = self.forget_weight * npo_loss(batch.forget.nll, reference[batch.forget.index], self.beta)
            return loss + self.retain_weight * hold(batch) if hold is not None else loss

        return train(model, plan, objective, self.training, run)
