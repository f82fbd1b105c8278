from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.erase.whp import WHP, generic_logits
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training

STRONG = Training(learning_rate=5e-3, epochs=10, warmup_epochs=0.0)


def test_generic_logits_match_the_worked_example():
    base, reinforced = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([3.0, 0.5, 0.0])
    assert generic_logits(base, reinforced, 1.0).tolist() == pytest.approx([1, 1, 0], abs=1e-6)


def test_whp_lowers_the_forget_answers():
    before, roles = reciting(), data()
    method = WHP(alpha=30.0, reinforce=STRONG, training=STRONG)
    after = method.apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)


def test_labels_that_forget_nothing_are_refused():
    with pytest.raises(PalimpsestError, match=r"whp: with alpha 1e-06 the generic labels equal the forget records"):
        WHP(alpha=1e-6, reinforce=Training(epochs=1)).apply(reciting(), data(), quiet())


def test_whp_needs_a_positive_alpha():
    with pytest.raises(PalimpsestError, match="alpha is 0, expected above 0"):
        WHP(alpha=0)
