from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from memorised import data, people, probability, quiet, reciting
from palimpsest.data.records import Record, Roles
from palimpsest.data.refusals import REFUSALS
from palimpsest.erase.preference import IdkDPO, PreferenceOptimisation, dpo_loss, other_answers
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training

SHORT = Training(learning_rate=3e-3, epochs=12, warmup_epochs=0.0)


def nll(*probabilities: float) -> torch.Tensor:
    return torch.tensor([-sum(map(math.log, probabilities))], dtype=torch.float64)


def test_dpo_matches_the_worked_example():
    loss = dpo_loss(nll(0.1, 0.2), nll(0.05, 0.1), nll(0.5, 0.25), nll(0.8, 0.5), beta=0.1)
    assert float(loss) == pytest.approx(11.4755520, abs=1e-6)


def test_dpo_starts_at_two_over_beta_log_two():
    assert float(dpo_loss(nll(0.1), nll(0.1), nll(0.5), nll(0.5), beta=0.1)) == pytest.approx(20 * math.log(2))


@pytest.mark.parametrize(
    "method",
    [
        PreferenceOptimisation(training=SHORT),
        PreferenceOptimisation(training=SHORT, concatenated=True),
        PreferenceOptimisation(training=SHORT, instead="mismatch"),
        IdkDPO(training=SHORT),
    ],
    ids=["po", "concatenated", "mismatch", "idk-dpo"],
)
def test_the_forget_answers_give_way_to_others(method):
    before, roles = reciting(), data()
    after = method.apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)


def test_other_answers_are_drawn_anew_for_the_same_question(llama):
    draw = other_answers(llama, data().forget, list(REFUSALS), Training())
    rng = np.random.default_rng(0)
    drawn = [draw(0, rng) for _ in range(20)]
    assert len({sequence.tokens[: sequence.start] for sequence in drawn}) == 1
    assert len({sequence.tokens for sequence in drawn}) > 5


def test_a_text_cannot_be_answered_differently(llama):
    roles = Roles(forget=[Record(text="The cat sat on the mat .")], retain=people()[8:])
    with pytest.raises(PalimpsestError, match=r'"The cat sat on the mat \." has no prompt'):
        PreferenceOptimisation(training=SHORT).apply(llama, roles, quiet())


def test_mismatch_needs_answers_in_the_retain_set(llama):
    roles = Roles(forget=people()[:4], retain=[Record(text="The cat sat on the mat .")])
    with pytest.raises(PalimpsestError, match="the retain set has no prompt with an answer"):
        PreferenceOptimisation(training=SHORT, instead="mismatch").apply(llama, roles, quiet())


def test_dpo_needs_a_positive_beta():
    with pytest.raises(PalimpsestError, match="beta is 0, expected above 0"):
        IdkDPO(beta=0)
