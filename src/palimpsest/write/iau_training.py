"""Fine-tuning with gradient restriction: no example is left with an outsized gradient.

The norm of each step's gradient is penalised, so that one later step (`iau`) can undo any example. It differentiates
twice, at two to three times the cost of plain training. Use it where deletions are expected and the model may be
trained for them.

Source: Liu et al. 2025 (arXiv 2507.23257), by its official code. Differs: there is no early stopping.

    CE    mean cross-entropy of a step, nats
    a     restriction

    L = CE + a sum over tensors w of ||d CE / d w||     (per_tensor, official code)
    L = CE + a ||d CE / d theta||                       (global, the code's README)
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train

Norm = Literal["per_tensor", "global"]


def gradient_restriction(
    loss: Float[Tensor, ""], weights: Sequence[Tensor], norm: Norm = "per_tensor"
) -> Float[Tensor, ""]:
    """The norm of the loss's gradient, itself differentiable; weights that the loss ignores count nothing.

    `per_tensor` adds up the L2 norms of the tensors, `global` is the L2 norm over all of them together. The loss must
    have been computed inside `twice_differentiable`, where its backward pass belongs, too.
    """
    found = torch.autograd.grad(loss, list(weights), create_graph=True, allow_unused=True)
    squares = [g.square().sum() for g in found if g is not None]
    if norm == "global":
        squares = [torch.stack(squares).sum()]
    # the root has no derivative at 0
    return (torch.stack(squares) + 1e-12).sqrt().sum()


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention is computed in the one form that can be differentiated twice; what cannot be is named."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("is not implemented", "differentiate twice")):
            raise
        raise PalimpsestError(
            f"gradient restriction differentiates twice, which a part of the network cannot ({str(error)[:120]}). "
            'Load the model with attn_implementation="eager", or set restriction to 0.'
        ) from error


@system(
    "iau-training",
    verb="write",
    title="Fine-tuning with gradient restriction",
    paper="Liu et al. 2025 (arXiv 2507.23257)",
    takes="causal-lm or classifier",
    needs={"train"},
    fidelity="matches the official code",
    deviations=(
        "a fixed number of epochs; the code stops early and keeps the best of up to 200 on a validation set",
        "AdamW without weight decay stands for Adam, which it equals",
        "language models are ours",
    ),
)
class RestrictedTraining(Method):
    """Trains on the role `train` with a penalty on the norm of each step's gradient."""

    restriction: float = setting(default=0.005, at_least=0, origin="official code", help="a; 0: plain fine-tuning")
    norm: Norm = setting(
        default="per_tensor", origin="official code; its README: global", help="which norm is penalised"
    )
    training: Training = setting(
        default=Training(
            learning_rate=1e-3,
            epochs=100,
            batch_size=64,
            weight_decay=0.0,
            warmup_epochs=0.0,
            decay="constant",
            max_grad_norm=1e9,
        ),
        origin="official code; epochs: ours",
        help="how to train; a step is always computed in one piece, whatever micro_tokens says",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after learning the records of `train`."""
        student = model if run.in_place else model.copy()
        in_place = run.replace(in_place=True)
        if not self.restriction:
            plan = schedule(student, self.training, run, train=data.train)
            return train(student, plan, lambda batch: batch.train.cross_entropy, self.training, in_place)
        # norms of the parts of a step do not add up to the norm of the step
        training = dataclasses.replace(self.training, micro_tokens=sys.maxsize)
        plan = schedule(student, training, run, train=data.train)
        if len(plan.steps[0]) > 1:
            raise PalimpsestError("iau-training: a step must be computed in one piece. Use one process.")

        def objective(batch: Batch) -> Float[Tensor, ""]:
            loss = batch.train.cross_entropy
            weights = [weight for weight in student.network.parameters() if weight.requires_grad]
            return loss + self.restriction * gradient_restriction(loss, weights, self.norm)

        with twice_differentiable():
            return train(student, plan, objective, training, in_place, label="learning")
