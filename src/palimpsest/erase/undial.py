"""UNDIAL: distil the model into itself with the memorised words made unlikely.

At every scored position the model's own predictions, with the logit of the memorised token lowered, become the target
of a distillation. The probability goes to what the model finds next best there, so answers stay fluent, and there is a
fixed target to arrive at: unlike ascent it cannot run away. Use it as the careful choice where only forget records are
at hand. With `focus="content"` only words that carry the fact are lowered: not those that repeat the question, and not
function words and punctuation, which any fluent answer needs.

Source: Dong et al. 2024 (arXiv 2402.10052); defaults of OpenUnlearning. Differs: OpenUnlearning's port lets the label
-100 index a vocabulary entry and averages over prompt tokens; here only answer tokens count. The predictions of the
model as given are kept as hidden states instead of a second model. `focus="content"` stands for the paper's focus on
nouns, without a tagger.

    z_ref   reference  [targets, vocab]  logits of the model as given
    y       targets    [targets]         memorised tokens
    f       chosen     [targets]         1 where the token is to be forgotten
    beta    strength                     how far the logit is lowered

    L = mean_t CE(softmax(z_ref - beta f onehot(y)), p)  +  retain_weight mean_t KL(p_ref || p) on retain
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.content import carries_fact
from palimpsest.data.encoding import Encoded
from palimpsest.data.records import Roles
from palimpsest.erase.gradient_ascent import retain_loss
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import ReferencePredictions
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


def lowered(
    logits: Float[Tensor, "targets vocabulary"],
    targets: Int[Tensor, " targets"],
    chosen: Bool[Tensor, " targets"],
    strength: float,
) -> Float[Tensor, "targets vocabulary"]:
    """Dong et al. 2024, eq. 3: the logits with those of the chosen targets lowered."""
    return logits.scatter_add(1, targets[:, None], -strength * chosen.to(logits.dtype)[:, None])


def chosen_targets(
    model: Model, sequences: Sequence[Encoded], focus: Literal["all", "content"]
) -> list[Bool[Tensor, " targets"]]:
    """Which targets of each sequence are to be forgotten; raises where there is none at all."""
    if focus == "all":
        return [torch.ones(len(s.targets), dtype=torch.bool, device=model.device) for s in sequences]
    chosen = [carries_fact(model.tokenizer, sequence).to(model.device) for sequence in sequences]
    if not any(bool(mask.any()) for mask in chosen):
        raise PalimpsestError("undial: every forget answer only repeats its question; there is no content to forget.")
    return chosen


@system(
    "undial",
    verb="erase",
    title="Self-distillation with adjusted logits (UNDIAL)",
    paper="Dong et al. 2024 (arXiv 2402.10052)",
    takes="causal-lm",
    needs={"forget"},
    uses={"retain"},
    fidelity="adapted",
    deviations=("focus=content uses a word list instead of a tagger", "the retain term is ours"),
)
class UNDIAL(Method):
    """Distils the model into itself with the memorised tokens' logits lowered; holds `retain` where it is given."""

    strength: float = setting(
        default=10.0, above=0, origin="paper; OpenUnlearning: beta 10", help="how far logits are lowered"
    )
    focus: Literal["all", "content"] = setting(default="all", origin="OpenUnlearning", help="which tokens are lowered")
    retain_weight: float = setting(default=1.0, at_least=0, origin="ours", help="weight of the divergence on retain")
    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the distillation."""
        plan = schedule(model, self.training, run, forget=data.forget, retain=data.get("retain"))
        reference = ReferencePredictions(model, plan.sequences["forget"], run)
        chosen = chosen_targets(model, plan.sequences["forget"], self.focus)
        hold = retain_loss("kl", model, plan, run) if "retain" in data else None

        def objective(batch: Batch) -> Float[Tensor, ""]:
            forget = batch.forget
            mask = torch.cat([chosen[int(i)] for i in forget.index])
            aim = lowered(reference.logits(forget.index), forget.targets, mask, self.strength).softmax(-1)
            loss = forget.mean_tokens(-(aim * forget.logits.log_softmax(-1)).sum(-1))
            return loss + self.retain_weight * hold(batch) if hold is not None else loss

        return train(model, plan, objective, self.training, run)
