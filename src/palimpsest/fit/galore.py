"""GaLore: Adam in the low-rank space of each gradient, so that its two moments take a fraction of the memory.

The gradient of a weight matrix is close to low rank while a network trains. It is projected onto its own leading
singular directions, Adam runs there, and the step is projected back; the directions are found anew every so often, so
that in the end every weight is trained (unlike LoRA). Use it where the optimizer's state does not fit. Its learning
rate is not Adam's: projected matrices move by `scale` times it.

Source: Zhao et al. 2024 (arXiv 2403.03507) and the authors' code. Differs: projectors are kept as tensors in float32
with the side they belong to (the code guesses it from shapes, and casts them to the weights' precision); 8-bit moments
are our own, in blocks of 256 on the dynamic levels of Dettmers et al. 2022 (arXiv 2110.02861).

    W, G     weight and gradient   [m, n]
    Q        projector             [r, n] on the right where m >= n, else P [m, r] on the left
    R        G Q^T (or P^T G), the gradient in the small space
    M, V     moments               shape of R
    alpha    scale                 T   gap, steps between two projectors

    every T steps   U, S, V^T = svd(G);  Q = first r rows of V^T  (or P = first r columns of U)
    M <- b1 M + (1 - b1) R         V <- b2 V + (1 - b2) R^2
    W <- W - lr alpha sqrt(1 - b2^t) / (1 - b1^t)  (M / (sqrt(V) + eps)) Q
    W <- W - lr lambda W                                          weight decay, not projected
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training, schedule, train
from palimpsest.training.low_rank import Choice, GaLoreAdamW, Moments, galore_groups, state_bytes


@system(
    "galore",
    verb="fit",
    title="GaLore: training in the low-rank space of gradients",
    paper="Zhao et al. 2024 (arXiv 2403.03507)",
    takes="causal-lm or classifier",
    needs={"train"},
    fidelity="matches the official code",
    deviations=(
        "projectors are float32 tensors with their side; the code casts them to the weights' precision",
        "8-bit moments are our own, in blocks of 256",
    ),
)
class GaLore(Method):
    """Trains on the role `train` with projected Adam."""

    rank: int = setting(default=0, at_least=0, origin="paper: about a quarter", help="r; 0: a quarter of each matrix")
    gap: int = setting(default=200, at_least=1, origin="paper", help="T, steps between two projectors")
    scale: float = setting(default=0.25, above=0, origin="paper", help="alpha")
    choice: Choice = setting(default="std", origin="paper", help="which side is projected")
    moments: Moments = setting(
        default="keep", origin="official code; the others ours", help="moments when the projector changes"
    )
    exact: bool = setting(default=True, origin="paper", help="exact singular vectors, or randomised ones")
    targets: tuple[str, ...] | None = setting(
        default=None, origin="paper", help="roles that are projected; None: attention and MLPs, else convolutions"
    )
    state_bits: Literal[32, 8] = setting(default=32, origin="paper: both", help="bits of a number of the moments")
    per_layer: bool = setting(
        default=False, origin="paper", help="step each weight as soon as its gradient is there, and free it"
    )
    training: Training = setting(
        default=Training(learning_rate=1e-3, epochs=8, batch_size=8, weight_decay=0.0, warmup_epochs=0.5),
        origin="ours",
        help="how to train; with per_layer a step is one piece, and gradients are not clipped",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after learning the records of `train`; its ledger entry has the bytes of the optimizer's state."""
        if self.training.lora_rank:
            raise PalimpsestError("galore trains the weights themselves: set training.lora_rank to 0.")
        plan = schedule(model, self.training, run, train=data.train)
        if self.per_layer and (len(plan.steps[0]) > 1 or self.training.max_grad_norm < 1e6):
            raise PalimpsestError(
                "galore: with per_layer a step must be computed in one piece and without clipping over all weights. "
                "Raise training.micro_tokens, and set training.max_grad_norm to 1e9."
            )
        made: list[GaLoreAdamW] = []

        def optimizer(network: nn.Module, training: Training) -> GaLoreAdamW:
            made.append(
                GaLoreAdamW(
                    galore_groups(network, self.rank, self.targets),
                    lr=training.learning_rate,
                    weight_decay=training.weight_decay,
                    gap=self.gap,
                    scale=self.scale,
                    choice=self.choice,
                    moments=self.moments,
                    exact=self.exact,
                    state_bits=self.state_bits,
                    per_layer=self.per_layer,
                )
            )
            return made[-1]

        try:
            trained = train(
                model, plan, lambda b: b.train.cross_entropy, self.training, run, optimizer=optimizer, label="fitting"
            )
        finally:
            for each in made:
                each.detach()
        last = made[-1]
        projected = [w for group in last.param_groups if group["rank"] is not None for w in group["params"]]
        run.note(
            state_bytes=state_bytes(last),
            skipped_steps=last.skipped,
            projected_share=sum(w.numel() for w in projected) / model.parameters,
        )
        return trained
