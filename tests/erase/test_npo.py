from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.data.records import Roles
from palimpsest.erase.npo import NPO, npo_loss
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training
from pictured import accuracy, pictures, recognising

# answer token probabilities (.5, .25) against (.8, .5) under the reference
S, S_REF = torch.tensor([2.0794415416798357], dtype=torch.float64), torch.tensor([0.916290731874155]).double()
SHORT = Training(learning_rate=1e-3, epochs=10, warmup_epochs=0.0)


def slope(nll: torch.Tensor, reference: torch.Tensor, beta: float) -> float:
    nll = nll.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(npo_loss(nll, reference, beta), nll)
    return float(gradient.sum())


def test_npo_matches_the_worked_example():
    assert float(npo_loss(S, S_REF, 0.1)) == pytest.approx(12.7335967, abs=1e-6)
    assert slope(S, S_REF, 0.1) == pytest.approx(-0.9419079, abs=1e-6)


def test_npo_starts_as_gradient_ascent():
    assert float(npo_loss(S_REF, S_REF, 0.1)) == pytest.approx(13.8629436, abs=1e-6)
    assert slope(S_REF, S_REF, 0.1) == pytest.approx(-1)


def test_npo_becomes_gradient_ascent_as_beta_vanishes():
    nll = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(npo_loss(nll, torch.ones(2, dtype=torch.float64), 1e-6), nll)
    torch.testing.assert_close(gradient, torch.full((2,), -0.5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_npo_fades_as_the_answer_goes():
    assert slope(S_REF + 1000, S_REF, 0.1) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("retain", ["none", "cross-entropy", "kl"])
def test_npo_lowers_the_forget_answers_first(retain):
    before, roles = reciting(), data()
    after = NPO(retain=retain, training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)


def test_npo_works_without_a_retain_set():
    before, roles = reciting(), data().replace(retain=None)
    after = NPO(training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < probability(before, roles.forget)
    assert set(after.ledger.entries[-1].data) == {"forget"}


def test_npo_without_a_forget_set_says_so(llama):
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        NPO().apply(llama, Roles(forget=[], retain=data().retain), quiet())
    with pytest.raises(PalimpsestError, match=r'npo needs the role "forget" \(given: retain\)'):
        NPO().apply(llama, Roles(retain=data().retain), quiet())


def test_npo_needs_a_positive_beta():
    for beta in (0, -0.1):
        with pytest.raises(PalimpsestError, match="expected above 0"):
            NPO(beta=beta)


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_a_classifier_forgets_labels_and_keeps_the_others(kind):
    before, roles = recognising(kind), pictures()
    training = Training(learning_rate=3e-3, epochs=15, batch_size=8, warmup_epochs=0.0)
    after = NPO(training=training).apply(before, roles, quiet())
    assert accuracy(after, roles.forget) <= 0.25
    assert accuracy(after, roles.retain) >= 0.8
