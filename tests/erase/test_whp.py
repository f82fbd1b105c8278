from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.erase.whp import WHP
from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import hold_down
from palimpsest.system import create
from palimpsest.train import Training

STRONG = Training(learning_rate=5e-3, epochs=10, warmup_epochs=0.0)


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


def test_at_decoding_time_it_predicts_from_the_generic_logits(tokens):
    before, roles = reciting(), data()
    after = create("whp-decode", alpha=5.0, reinforce=STRONG).apply(before, roles, quiet())
    target, reinforced = (after.network.member(name) for name in ("target", "reinforced"))
    with torch.no_grad():
        assert torch.equal(target(tokens).logits, before(input_ids=tokens).logits)
        expected = hold_down(target(tokens).logits, reinforced(tokens).logits, 5.0)
        torch.testing.assert_close(after(input_ids=tokens).logits, expected)
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)
    assert (
        probability(after, roles.forget) < probability(weaker(after), roles.forget) < probability(before, roles.forget)
    )


def weaker(model):
    model = model.copy()
    model.network.adjust(alpha=0.5)
    return model


def test_a_reinforcement_that_changes_nothing_is_refused():
    none = Training(epochs=1, batch_size=4, warmup_epochs=1.0)
    with pytest.raises(PalimpsestError, match="whp: reinforcing changed nothing, so nothing would be held down"):
        create("whp-decode", reinforce=none).apply(reciting(), data(), quiet())
