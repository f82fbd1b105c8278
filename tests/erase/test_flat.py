from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memorised import data, probability, quiet, reciting
from palimpsest.data.records import Record, Roles
from palimpsest.erase.flat import DIVERGENCES, FLAT, WRONG_SIGN, critic, flat_loss, weights
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.errors import PalimpsestError
from palimpsest.train import Batch, Training, schedule, train

SHORT = Training(learning_rate=1e-3, epochs=10, warmup_epochs=0.0)
inside = st.floats(1e-6, 1 - 1e-6)


def loss(template: float, forget: float, divergence: str, **more: str) -> float:
    e, f = torch.tensor([template], dtype=torch.float64), torch.tensor([forget], dtype=torch.float64)
    return float(flat_loss(e, f, divergence, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("divergence", "value", "template", "forget"),
    [
        ("kl", 0.3048374, 1, 0.9048374),
        ("tv", 0.0896241, 0.3557888, 0.2434588),
        ("js", 0.2923475, 0.3543437, 0.7109495),
        ("pearson", 0.5025, 1, 1.45),
    ],
)
def test_the_worked_numbers_of_every_divergence(divergence, value, template, forget):
    assert loss(0.6, 0.9, divergence) == pytest.approx(value, abs=1e-7)
    assert weights(0.6, 0.9, divergence) == pytest.approx((template, forget), abs=2e-7)


@given(inside, inside)
def test_the_template_is_always_raised_and_the_forget_answer_lowered(template, forget):
    for divergence in DIVERGENCES:
        assert min(weights(template, forget, divergence)) > 0


@given(inside, inside)
def test_the_losses_are_bounded(template, forget):
    assert math.exp(-1) - 1 < loss(template, forget, "kl") < 1
    assert abs(loss(template, forget, "tv")) < math.tanh(1) / 2
    assert loss(forget, forget, "tv") == 0
    js = 2 * math.log1p(math.exp(forget)) - forget - 2 * math.log(2)
    assert loss(forget, forget, "js") == pytest.approx(js, abs=1e-12)


@pytest.mark.parametrize("divergence", WRONG_SIGN)
def test_divergences_of_the_wrong_sign_are_refused(divergence):
    with pytest.raises(PalimpsestError, match="would raise the forget answer"):
        loss(0.6, 0.9, divergence)
    with pytest.raises(PalimpsestError, match="divergence"):
        FLAT(divergence=divergence)


def test_both_reductions_agree_on_one_example_and_differ_on_two():
    e, f = torch.tensor([0.2, 0.7]), torch.tensor([0.9, 0.1])
    for divergence in DIVERGENCES:
        one = loss(0.2, 0.9, divergence, reduce="batch_first")
        assert one == pytest.approx(loss(0.2, 0.9, divergence), abs=1e-12)
    assert float(flat_loss(e, f, "kl")) > float(flat_loss(e, f, "kl", "batch_first"))  # exp is convex


def seen(model, records):
    """The views of one step, as `(critic, probabilities by hand, view)`."""
    found = {}

    def objective(batch: Batch) -> torch.Tensor:
        view = batch.forget
        found.update(view=view, critic=critic(view).detach(), padded=critic(view, 101).detach())
        return view.cross_entropy

    once = Training(learning_rate=1e-9, epochs=1, batch_size=16)
    train(model, schedule(model, once, quiet(), forget=records), objective, once, quiet())
    return found


def test_the_critic_is_the_mean_probability_of_an_answers_own_tokens(llama):
    found = seen(llama, data().forget[:1])
    own = found["view"].log_probs.detach().exp()
    assert float(found["critic"]) == pytest.approx(float(own.mean()), rel=1e-5)
    assert float(found["critic"]) != pytest.approx(float(own.log().mean().exp()), rel=1e-5)
    assert float(found["padded"]) == pytest.approx(float(found["critic"]) * len(own) / 100, rel=1e-5)


def test_the_worked_tokens_give_the_worked_loss():
    assert loss((0.1 + 0.2) / 2, (0.5 + 0.25) / 2, "kl") == pytest.approx(0.3852614, abs=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_forget_answers_go_and_the_rest_stays_above_them(divergence):
    before, roles = reciting(), data()
    after = FLAT(divergence=divergence, training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)


def test_only_forget_data_is_used():
    roles = data()
    with_retain = FLAT(training=SHORT).apply(reciting(), roles, quiet())
    alone = FLAT(training=SHORT).apply(reciting(), Roles(forget=roles.forget), quiet())
    assert with_retain.digest() == alone.digest()
    assert set(with_retain.ledger.entries[-1].data) == {"forget"}


def test_what_is_forgotten_stops_falling_where_ascent_goes_on():
    roles = data()
    long = Training(learning_rate=1e-3, epochs=40, warmup_epochs=0.0, decay="constant")
    flat, ascent = (m.apply(reciting(), roles, quiet()) for m in (FLAT(training=long), GradientAscent(training=long)))
    assert probability(ascent, roles.forget) < 0.5 * probability(flat, roles.forget)


def test_its_notes_show_critic_and_weights_of_every_step():
    after = FLAT(training=SHORT).apply(reciting(), data(), quiet())
    notes = after.ledger.entries[-1].notes
    assert len(notes["forget_probability"]) == 10
    assert notes["forget_probability"][0] > notes["forget_probability"][-1]
    first = weights(notes["template_probability"][0], notes["forget_probability"][0], "tv")
    assert (notes["template_weight"][0], notes["forget_weight"][0]) == pytest.approx(first)


def test_a_template_that_is_never_learned_is_said():
    roles = Roles(forget=data().forget)
    after = FLAT(templates=("The cat sat on the mat .",), training=Training(epochs=1)).apply(reciting(), roles, quiet())
    assert any("did not learn to give them" in text for text in after.ledger.entries[-1].notes["warnings"])


def test_it_stops_where_enough_is_forgotten():
    after = FLAT(enough=0.85, training=SHORT).apply(reciting(), data(), quiet())
    curve = after.ledger.entries[-1].notes["forget_probability"]
    assert curve[-1] < 0.85 <= min(curve[:-1])
    assert len(curve) < 10


def test_batch_first_gives_the_same_when_answers_are_alike_and_needs_whole_steps(llama):
    small = Training(epochs=1, micro_tokens=8)
    with pytest.raises(PalimpsestError, match="needs a step in one piece"):
        FLAT(reduce="batch_first", training=small).apply(llama, Roles(forget=data().forget), quiet())
    after = FLAT(reduce="batch_first", training=SHORT).apply(reciting(), data(), quiet())
    assert probability(after, data().forget) < 0.7


def test_padding_shrinks_the_gradient_not_the_direction():
    roles = Roles(forget=data().forget)
    after = FLAT(normalise="padded", training=SHORT).apply(reciting(), roles, quiet())
    assert probability(after, roles.forget) < 0.7


def test_a_template_equal_to_the_forget_answer_is_refused(llama):
    record = Record(prompt="Where was Ada Moreau born ?", answer="I do not know .")
    with pytest.raises(PalimpsestError, match="a template is the very answer to forget"):
        FLAT(templates=("I do not know . ",)).apply(llama, Roles(forget=[record]), quiet())
    with pytest.raises(PalimpsestError, match="holds an empty answer"):
        FLAT(templates=(" ",)).apply(llama, Roles(forget=[record]), quiet())


def test_a_text_has_no_question_to_answer(llama):
    with pytest.raises(PalimpsestError, match="has no prompt"):
        FLAT(training=SHORT).apply(llama, Roles(forget=[Record(text="The cat sat on the mat .")]), quiet())
