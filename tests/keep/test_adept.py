"""ADEPT: only the copies learn, each tensor at the rate that general text leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import NEUTRAL, build_model
from memorised import data, quiet
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.keep.adept import Adept, UnitAdamW, chosen_layers, multipliers, unit_importance
from palimpsest.models.depth import expand
from palimpsest.statistics.examples import Examples
from palimpsest.system import create
from palimpsest.train import Training

GENERAL = [Record(text=text) for text in NEUTRAL]
SHORT = Training(learning_rate=1e-2, epochs=3, batch_size=4, warmup_epochs=0.0)


def roles() -> Roles:
    return Roles(train=data().train, general=GENERAL)


def copies_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """The tensors of the last block, after one was copied."""
    (path,) = expand(model.network, [1])
    return {n: w for n, w in model.network.named_parameters() if n.startswith(path)}


def test_multipliers_by_hand():
    found = multipliers(torch.tensor([0.1, 0.3, 0.2, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0, 1.5, 0.0], dtype=torch.float64))
    assert float(found.mean()) == pytest.approx(1.125)


def test_multipliers_depend_on_neither_scale_nor_order():
    importance = torch.rand(9, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(multipliers(1e-6 * importance), multipliers(importance))
    torch.testing.assert_close(multipliers(importance[order]), multipliers(importance)[order])


def test_alike_units_all_have_the_scheduled_rate():
    assert multipliers(torch.zeros(4)).tolist() == [1.0] * 4


def test_layers_are_chosen_as_they_are_needed():
    importance = [3.0, 0.1, 0.5, 0.1, 2.0, 0.2]
    assert chosen_layers(importance, 3) == [1, 3, 5]
    assert chosen_layers(importance, 2, "most") == [0, 4]
    assert chosen_layers(importance, 3, "uniform") == [1, 3, 5]
    assert chosen_layers([0.0] * 30, 4, "uniform") == [6, 14, 21, 29]


def test_at_first_only_what_was_silenced_has_a_gradient_and_nothing_has_importance():
    model = build_model("llama")
    units = copies_of(model)
    examples = Examples(model, GENERAL)
    assert not unit_importance(model, units, examples, 2).any()
    loss = examples.batch([0, 1]).losses(model.network).sum()
    moved = {n for n, g in zip(units, torch.autograd.grad(loss, list(units.values())), strict=True) if g.any()}
    assert {name.split("layers.2.")[1] for name in moved} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_importance_is_weight_times_mean_gradient():
    model = build_model("llama")
    units = dict(model.network.model.layers[1].named_parameters())
    examples = Examples(model, GENERAL)
    found = unit_importance(model, units, examples, 1)
    gradients = []
    for i in range(len(GENERAL)):
        batch = examples.batch([i])
        model.network.zero_grad()
        (batch.losses(model.network).sum() / batch.count.sum()).backward()
        gradients.append({name: weight.grad.abs() for name, weight in units.items()})
    for value, (name, weight) in zip(found, units.items(), strict=True):
        mean = torch.stack([g[name] for g in gradients]).mean(0)
        assert float(value) == pytest.approx(float((weight.detach().abs() * mean).mean()), rel=1e-4)


def test_the_originals_stay_bit_for_bit_and_the_copies_learn():
    model = build_model("llama")
    before = {name: weight.clone() for name, weight in model.network.named_parameters()}
    result = Adept(layers=(1,), refresh=2, training=SHORT).apply(model, roles(), quiet())
    after = dict(result.network.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert after["model.layers.2.mlp.down_proj.weight"].any()
    notes = result.ledger.entries[-1].notes
    assert notes["copies"] == ["model.layers.2"]
    assert 0 < notes["trainable_share"] < 0.5


def test_after_every_refresh_one_unit_stands_still_and_one_learns_twice_as_fast():
    result = Adept(layers=(1,), refresh=2, training=SHORT).apply(build_model("llama"), roles(), quiet())
    rates = result.ledger.entries[-1].notes["unit_rates"]
    assert len(rates) >= 2
    for row in rates:
        assert (min(row), max(row)) == (0.0, 2.0)


def test_the_multiplier_scales_the_rate_and_the_scheduler_does_not_see_it():
    weights = {name: torch.nn.Parameter(torch.ones(3, 3)) for name in "abc"}
    optimizer = UnitAdamW(weights, Training(learning_rate=0.1, weight_decay=0.0))
    optimizer.set(torch.tensor([0.0, 1.0, 2.0]))
    for weight in weights.values():
        weight.grad = torch.ones(3, 3)
    optimizer.step()
    moved = [float(1 - weight.detach()[0, 0]) for weight in weights.values()]
    assert moved == pytest.approx([0.0, 0.1, 0.2], rel=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_norms_are_not_decayed():
    optimizer = UnitAdamW({"w": torch.nn.Parameter(torch.ones(2, 2)), "n": torch.nn.Parameter(torch.ones(2))}, SHORT)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [SHORT.weight_decay, 0.0]


def test_blocks_are_chosen_by_what_general_text_loses():
    model = build_model("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.network.model.layers[0].get_submodule(name).weight.data.mul_(1e-3)
    found = Adept(copies=1, training=SHORT).apply(model, roles(), quiet()).ledger.entries[-1].notes
    assert found["copies"] == ["model.layers.1"]  # the copy of block 0
    assert found["layer_importance"][0] < found["layer_importance"][1]
    most = Adept(copies=1, choice="most", training=SHORT).apply(model, roles(), quiet()).ledger.entries[-1].notes
    assert most["copies"] == ["model.layers.2"]


def test_llama_pro_is_a_setting_of_it():
    method = create("llama-pro", **{"training.epochs": 1})
    notes = method.apply(build_model("llama"), roles(), quiet()).ledger.entries[-1].notes
    assert "layer_importance" not in notes
    assert "unit_rates" not in notes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"copies": 3}, "3 of 2 blocks cannot be copied"),
        ({"layers": (0, 0)}, "named twice"),
        ({"layers": (7,)}, "there is no block 7"),
        ({"training": Training(lora_rank=4)}, "set training.lora_rank to 0"),
    ],
)
def test_bad_settings_are_named(fields, words):
    with pytest.raises(PalimpsestError, match=words):
        Adept(**{"training": SHORT, **fields}).apply(build_model("llama"), roles(), quiet())


def test_layers_and_copies_exclude_each_other_and_refresh_is_positive():
    with pytest.raises(PalimpsestError, match="layers already says which"):
        Adept(layers=(1,), copies=2)
    with pytest.raises(PalimpsestError, match="refresh is 0, expected at least 1"):
        Adept(refresh=0)
