"""Preference optimisation (PO) and IdkDPO: teach another answer to the forget questions.

PO fine-tunes on a refusal ("I don't know") or, as `mismatch`, on an answer to some other question; IdkDPO prefers the
refusal to the true answer by direct preference optimisation. All leave fluent answers; PO only covers the old answer
up, which a relearning attack shows. Use them where a polite refusal is what is wanted.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121), section 3.2; Rafailov et al. 2023 (arXiv 2305.18290) for DPO;
OpenUnlearning. Differs: PO sums the two means, while TOFU's code takes one token-weighted mean over both
(`concatenated=True`), in which short refusals weigh less; DPO's reference likelihoods are computed once.

    S_w, S_l       nll            [batch]  summed negative log-likelihood of refusal and forget answer, nats
    S_w', S_l'     reference_nll  [batch]  the same under the model as given
    beta                                   inverse temperature

    PO:   L = CE(forget question, other answer) + alpha CE(retain)
    DPO:  L = -(2 / beta) mean log sigmoid(beta [(S_w' - S_w) - (S_l' - S_l)]) + alpha CE(retain)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.data.refusals import REFUSALS
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.system import Method, configuration, setting, system
from palimpsest.train import Batch, Drawn, Training, schedule, train


def dpo_loss(
    winner: Float[Tensor, " batch"],
    winner_reference: Float[Tensor, " batch"],
    loser: Float[Tensor, " batch"],
    loser_reference: Float[Tensor, " batch"],
    beta: float,
) -> Float[Tensor, ""]:
    """DPO on summed negative log-likelihoods, with the factor 2 / beta of the unlearning literature."""
    margin = (winner_reference - winner) - (loser_reference - loser)
    return 2 / beta * F.softplus(-beta * margin).mean()


def other_answers(model: Model, records: list[Record], answers: list[str], training: Training) -> Drawn:
    """A sequence with the record's question and one of the answers, drawn anew at every access."""
    encoder = Encoder.of(model, training.max_length)
    missing = next((record for record in records if record.prompt is None), None)
    if missing is not None:
        raise PalimpsestError(f'"{missing.title}" has no prompt; another answer can only be given to a question.')

    def draw(example: int, rng: np.random.Generator) -> Encoded:
        prompt = records[example].prompt
        assert prompt is not None
        return encoder.pair(prompt, answers[int(rng.integers(len(answers)))], example)

    return draw


def answers_of(records: list[Record]) -> list[str]:
    """The answers of the records that have one; raises where none has."""
    answers = [record.answer for record in records if record.answer is not None]
    if not answers:
        raise PalimpsestError("the retain set has no prompt with an answer; there is nothing to answer instead.")
    return answers


@configuration(
    "mismatch",
    title="Mismatched answers",
    preset={"instead": "mismatch"},
)
@system(
    "po",
    verb="erase",
    title="Preference optimisation (refusals)",
    paper="Maini et al. 2024 (arXiv 2401.06121)",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="matches the official code",
    deviations=("the sum of two means; the code takes one token-weighted mean over both sets",),
)
class PreferenceOptimisation(Method):
    """Fine-tunes on another answer to the forget questions while holding `retain`."""

    instead: Literal["refusal", "mismatch"] = setting(default="refusal", origin="paper", help="what to answer instead")
    concatenated: bool = setting(
        default=False, origin="ours; the paper's code: True", help="one token-weighted mean over both sets"
    )
    retain_weight: float = setting(default=1.0, at_least=0, origin="paper", help="alpha, ignored where concatenated")
    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after learning the other answers."""
        answers = list(REFUSALS) if self.instead == "refusal" else answers_of(data.retain)
        other = other_answers(model, data.forget, answers, self.training)
        plan = schedule(model, self.training, run, anchors=len(data.forget), other=other, retain=data.retain)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            if not self.concatenated:
                return batch.other.cross_entropy + self.retain_weight * batch.retain.cross_entropy
            a, b = batch.other.tokens_per_example, batch.retain.tokens_per_example
            return (a * batch.other.cross_entropy + b * batch.retain.cross_entropy) / (a + b)

        return train(model, plan, objective, self.training, run)


@system(
    "idk-dpo",
    verb="erase",
    title="IdkDPO",
    paper="Rafailov et al. 2023 (arXiv 2305.18290); Maini et al. 2024 (arXiv 2401.06121)",
    takes="causal-lm",
    needs={"forget"},
    uses={"retain"},
    fidelity="matches the official code",
)
class IdkDPO(Method):
    """Prefers a refusal to the forget answer; holds `retain` where it is given."""

    beta: float = setting(default=0.1, above=0, origin="OpenUnlearning", help="inverse temperature")
    forget_weight: float = setting(default=1.0, above=0, origin="OpenUnlearning", help="gamma")
    retain_weight: float = setting(default=1.0, at_least=0, origin="OpenUnlearning", help="alpha")
    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after preferring refusals."""
        refusal = other_answers(model, data.forget, list(REFUSALS), self.training)
        plan = schedule(model, self.training, run, forget=data.forget, refusal=refusal, retain=data.get("retain"))
        loser = sequence_nll(model, plan.sequences["forget"], run)
        winner = sequence_nll(model, plan.sequences["refusal"], run)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            f, r = batch.forget, batch.refusal
            loss = self.forget_weight * dpo_loss(r.nll, winner[r.index], f.nll, loser[f.index], self.beta)
            return loss + self.retain_weight * batch.retain.cross_entropy if "retain" in batch else loss

        return train(model, plan, objective, self.training, run)
