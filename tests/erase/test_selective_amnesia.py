from __future__ import annotations

import dataclasses

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.data.records import Record, Roles
from palimpsest.erase.selective_amnesia import SelectiveAmnesia, adaptive_weight
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training, schedule, train

SHORT = Training(learning_rate=1e-3, epochs=15, batch_size=6, warmup_epochs=0.0, weight_decay=0.0)


@pytest.mark.parametrize(
    ("delta", "alpha"),
    [
        (-1, 1.2),
        (0, 1.2),
        (0.2, 1.2292907),
        (0.3, 1.3135310),
        (0.5, 1.5348469),
        (0.8, 2.0578888),
        (1.0, 2.6),
        (1.1, 2.8),
    ],
)
def test_the_worked_weights(delta, alpha):
    assert adaptive_weight(delta) == pytest.approx(alpha, abs=1e-7)


@pytest.mark.parametrize(("delta", "alpha"), [(0.3, 1.3), (0.5, 1.5), (0.7, 1.9), (0.9, 2.3), (1.0, 2.3)])
def test_the_weights_as_the_code_rounds_them(delta, alpha):
    assert adaptive_weight(delta, most=2.3, decimals=1) == pytest.approx(alpha)


def test_only_the_chosen_mlps_change():
    before = reciting()
    after = SelectiveAmnesia(layers=(1,), training=SHORT).apply(before, data(), quiet())
    changed = {
        name
        for name, weight in after.network.state_dict().items()
        if not torch.equal(weight, before.network.state_dict()[name])
    }
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate", "down")}


@pytest.mark.parametrize(("module", "part"), [("attention", "self_attn"), ("both", "")])
def test_attention_may_be_trained_instead(module, part):
    before = reciting()
    after = SelectiveAmnesia(layers=(0,), module=module, training=SHORT).apply(before, data(), quiet())
    old, new = before.network.state_dict(), after.network.state_dict()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed
    assert all(name.startswith(f"model.layers.0.{part}") for name in changed)
    assert any("mlp" in name for name in changed) == (module == "both")


def test_all_layers_and_a_fixed_weight_of_one_is_gradient_difference():
    roles = data()
    method = SelectiveAmnesia(layers="all", module="both", adaptive=False, least=1.0, cap=1e9, training=SHORT)
    after = method.apply(reciting(), roles, quiet())
    plan = schedule(reciting(), SHORT, quiet(), pooled=True, forget=roles.forget, retain=roles.retain)

    def difference(batch):
        parts = [-batch.forget.cross_entropy] if "forget" in batch else []
        return sum([*parts, batch.retain.cross_entropy] if "retain" in batch else parts, torch.zeros(()))

    inner = lambda name: "mlp" in name or "self_attn" in name  # noqa: E731
    expected = train(reciting(), plan, difference, SHORT, quiet(), trainable=inner)
    assert after.digest() == expected.digest()


def test_the_forget_answers_go_first():
    before, roles = reciting(), data()
    after = SelectiveAmnesia(training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)


def test_the_weight_is_least_in_the_first_epoch_and_then_follows_the_retain_loss():
    hot = dataclasses.replace(SHORT, learning_rate=1e-2, epochs=6, decay="constant")
    after = SelectiveAmnesia(layers="all", training=hot).apply(reciting(), data(), quiet())
    curve = after.ledger.entries[-1].notes["retain_weight"]
    assert curve[:2] == [1.2, 1.2]
    assert max(curve) > 1.2
    assert all(1.2 <= weight <= 2.8 for weight in curve)


def test_the_weight_stays_least_where_nothing_is_forgotten_however_long_the_answers_are():
    still = dataclasses.replace(SHORT, learning_rate=1e-12, epochs=3, batch_size=16, micro_tokens=16)
    known, words = data(), "Ada lives in the old town near the river and walks to the market every day"
    long = [dataclasses.replace(record, answer=f"{record.answer} {words}") for record in known.retain]
    roles = known.replace(retain=[*known.retain, *long])
    after = SelectiveAmnesia(layers="all", training=still).apply(reciting(), roles, quiet())
    curve = after.ledger.entries[-1].notes["retain_weight"]
    assert len(curve) > 9  # several pieces a step, of different lengths
    assert set(curve) == {1.2}


def test_questions_that_do_not_name_their_subject_are_passed_over():
    roles, short = data(), dataclasses.replace(SHORT, epochs=1)
    nameless = Record(prompt="Where is she from ?", answer="Lyon", subject="Ada Moreau")
    with_one = SelectiveAmnesia(training=short).apply(
        reciting(), roles.replace(forget=[nameless, *roles.forget]), quiet()
    )
    without = SelectiveAmnesia(training=short).apply(reciting(), roles, quiet())
    assert with_one.ledger.entries[-1].notes["effects"] == without.ledger.entries[-1].notes["effects"]
    with pytest.raises(PalimpsestError, match="its subject 'Ada Moreau' is not in it"):
        SelectiveAmnesia(training=short).apply(reciting(), roles.replace(forget=[nameless]), quiet())


def test_the_traced_layers_and_the_map_are_noted():
    notes = SelectiveAmnesia(training=SHORT).apply(reciting(), data(), quiet()).ledger.entries[-1].notes
    assert len(notes["layers"]) == 1
    assert notes["total_effect"] > 0.3
    assert len(notes["effects"]) == 6


def test_beyond_the_cap_there_is_nothing_to_gain():
    """A cap below the loss that every target has already leaves only the retain term."""
    method = SelectiveAmnesia(layers="all", cap=1e-9, adaptive=False, training=SHORT)
    after = method.apply(reciting(), data(), quiet())
    assert probability(after, data().forget) > 0.5


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (SelectiveAmnesia(layers=(7,)), "layer 7 does not exist: LlamaForCausalLM has layers 0 to 1"),
        (SelectiveAmnesia(layers=()), "layers is empty"),
        (SelectiveAmnesia(least=3.0), "least is 3, more than most"),
    ],
)
def test_bad_settings(llama, method, told):
    with pytest.raises(PalimpsestError, match=told):
        method.apply(llama, data(), quiet())


def test_bad_data(llama):
    roles = data()
    with pytest.raises(PalimpsestError, match='needs the role "retain"'):
        SelectiveAmnesia().apply(llama, Roles(forget=roles.forget), quiet())
    with pytest.raises(PalimpsestError, match="forget and retain share"):
        SelectiveAmnesia().apply(llama, Roles(forget=roles.forget, retain=roles.forget), quiet())
