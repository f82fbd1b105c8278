from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.erase.simnpo import SimNPO, simnpo_loss
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training

A = torch.tensor([1.0397207708399179], dtype=torch.float64)


@pytest.mark.parametrize(("beta", "delta", "expected"), [(4.5, 0.0, 0.0041101), (2.5, 0.5, 0.1845219)])
def test_simnpo_matches_the_worked_examples(beta, delta, expected):
    assert float(simnpo_loss(A, beta, delta)) == pytest.approx(expected, abs=1e-6)


def test_simnpo_lowers_the_forget_answers():
    before, roles = reciting(), data()
    after = SimNPO(training=Training(learning_rate=3e-3, epochs=10, warmup_epochs=0.0)).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)


def test_simnpo_needs_its_settings_in_range():
    with pytest.raises(PalimpsestError, match="beta is 0, expected above 0"):
        SimNPO(beta=0)
    with pytest.raises(PalimpsestError, match="delta is -1, expected at least 0"):
        SimNPO(delta=-1)
