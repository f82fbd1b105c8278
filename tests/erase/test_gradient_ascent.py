from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.data.records import Roles
from palimpsest.erase.gradient_ascent import GradientAscent, everywhere, kl_divergence, retain_loss
from palimpsest.errors import PalimpsestError
from palimpsest.system import create
from palimpsest.train import Training, schedule, train
from pictured import accuracy, pictures, recognising

SHORT = Training(learning_rate=1e-3, epochs=10, warmup_epochs=0.0)


def test_the_divergence_matches_the_worked_example():
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    logits = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    assert float(kl_divergence(reference, logits).mean()) == pytest.approx(0.0719205, abs=1e-6)


def test_the_divergence_ignores_a_constant_added_to_the_logits():
    logits = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(kl_divergence(logits + 3, logits - 2), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("positions", ["labels", "all"])
def test_the_divergence_from_the_model_itself_is_zero_and_grows(causal_lm, positions):
    """The reference is kept as inputs of the output layer: it must give the same predictions on every architecture."""
    retain = data().retain
    given = retain if positions == "labels" else everywhere(causal_lm, retain, SHORT)
    plan = schedule(causal_lm, SHORT, quiet(), retain=given)
    hold, seen = retain_loss("kl", causal_lm, plan, quiet()), []

    def objective(batch):
        seen.append(float(hold(batch).detach()))
        return batch.retain.cross_entropy

    train(causal_lm, plan, objective, SHORT, quiet())
    assert seen[0] == pytest.approx(0, abs=1e-6)
    assert seen[-1] > 1e-5


@pytest.mark.parametrize(
    "method",
    [
        GradientAscent(training=SHORT),
        create("gradient-difference", training=SHORT),
        create("kl-minimisation", training=SHORT),
        create("kl-minimisation", training=SHORT, positions="all"),
    ],
    ids=["ascent", "difference", "kl", "kl-everywhere"],
)
def test_the_forget_answers_go_down(method):
    before, roles = reciting(), data()
    after = method.apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.8 * probability(before, roles.forget)


def test_a_leash_keeps_more_than_none():
    before, roles = reciting(), data()
    free = GradientAscent(training=SHORT).apply(before, roles, quiet())
    held = create("gradient-difference", training=SHORT).apply(before, roles, quiet())
    assert probability(held, roles.retain) > probability(free, roles.retain) + 0.1


def test_the_ascent_alone_does_not_look_at_the_retain_set():
    model, roles = reciting(), data()
    with_it = GradientAscent(training=SHORT).apply(model, roles, quiet())
    assert with_it.digest() == GradientAscent(training=SHORT).apply(model, Roles(forget=roles.forget), quiet()).digest()


def test_a_leash_needs_the_retain_set(llama):
    with pytest.raises(PalimpsestError, match='with retain=kl needs the role "retain"'):
        create("kl-minimisation").apply(llama, Roles(forget=data().forget), quiet())


def test_overlapping_sets_are_refused_before_any_work(llama):
    roles = data()
    overlapping = roles.replace(retain=[*roles.retain, roles.forget[1]])
    with pytest.raises(PalimpsestError, match=r'forget and retain share 1 record \(first: "What does Ada Moreau do'):
        create("gradient-difference").apply(llama, overlapping, quiet())


def test_an_empty_retain_set_is_refused_even_where_it_is_optional(llama):
    with pytest.raises(PalimpsestError, match=r"the retain set is empty\. Leave the role out, or fill it"):
        GradientAscent().apply(llama, data().replace(retain=[]), quiet())


@pytest.mark.parametrize("kind", ["convnet", "vit"])
@pytest.mark.parametrize("slug", ["gradient-ascent", "gradient-difference", "kl-minimisation"])
def test_a_classifier_forgets_labels(slug, kind):
    before, roles = recognising(kind), pictures()
    after = create(slug, training=Training(learning_rate=3e-3, epochs=20, warmup_epochs=0.0)).apply(
        before, roles, quiet()
    )
    assert accuracy(before, roles.forget) == 1
    assert accuracy(after, roles.forget) <= 0.5


def test_the_divergence_of_a_classifier_from_itself_is_zero_and_grows(vit):
    training = Training(learning_rate=1e-3, epochs=3, batch_size=16, micro_tokens=5, warmup_epochs=0.0)
    plan = schedule(vit, training, quiet(), retain=pictures().retain)
    hold, seen = retain_loss("kl", vit, plan, quiet()), []

    def objective(batch):
        seen.append(float(hold(batch).detach()))
        return batch.retain.cross_entropy

    train(vit, plan, objective, training, quiet())
    assert seen[0] == pytest.approx(0, abs=1e-6)
    assert seen[-1] > 1e-3


def test_a_label_is_the_only_position_of_a_classifier():
    model, roles = recognising("vit"), pictures()
    made = [
        create("kl-minimisation", training=Training(epochs=1, learning_rate=1e-3), positions=positions)
        for positions in ("labels", "all")
    ]
    assert len({method.apply(model, roles, quiet()).digest() for method in made}) == 1
