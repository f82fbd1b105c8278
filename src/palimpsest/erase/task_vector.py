"""Task-vector negation: learn the forget records harder, then step the other way.

The difference that further fine-tuning on the forget set makes is taken as the direction of that knowledge and
subtracted. One multiplication once the vector is known; no retain data. Use it as the arithmetic baseline: large steps
forget, and cost utility with it.

Source: Ilharco et al. 2023 (arXiv 2212.04089), section 3; defaults of MUSE (Shi et al. 2024, arXiv 2407.06460).

    theta        model as given
    theta*       after further fine-tuning on the forget set
    alpha        scale

    theta_un = theta - alpha (theta* - theta)      floating-point weights, in float32, tied weights once

Buffers, the running averages of batch normalisation among them, stay those of the model as given: stepped back, a
variance could become negative.
"""

from __future__ import annotations

import torch

from palimpsest.data.records import Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training, schedule, train


@torch.no_grad()
def negate(network: torch.nn.Module, further: torch.nn.Module, alpha: float) -> None:
    """Moves the network's weights by -alpha times the difference to those of `further`, in place."""
    other = dict(further.named_parameters())
    for name, weight in network.named_parameters():
        step = other[name].float() - weight.float()
        weight.copy_(weight.float() - alpha * step)


@system(
    "task-vector",
    verb="erase",
    title="Task-vector negation",
    paper="Ilharco et al. 2023 (arXiv 2212.04089)",
    takes="causal-lm or classifier",
    needs={"forget"},
    fidelity="matches the official code",
)
class TaskVector(Method):
    """Subtracts what further fine-tuning on the forget set would add."""

    alpha: float = setting(default=5.0, above=0, origin="MUSE", help="how far to step")
    training: Training = setting(
        default=Training(decay="constant", weight_decay=0.0, warmup_epochs=0.0),
        origin="MUSE",
        help="how to learn the vector",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the step."""
        plan = schedule(model, self.training, run, forget=data.forget)
        further = train(
            model, plan, lambda batch: batch.forget.cross_entropy, self.training, run.replace(in_place=False)
        )
        edited = model if run.in_place else model.copy()
        negate(edited.network, further.network, self.alpha)
        return edited
