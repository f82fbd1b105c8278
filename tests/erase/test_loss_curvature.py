"""The curvature edit: which pairs of directions stay, what the matrix becomes, and how a method uses it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import build_model
from memorised import data, quiet
from palimpsest.data.records import Record, Roles
from palimpsest.erase.loss_curvature import LossCurvature, SpectrumEdit, kept_pairs, spread
from palimpsest.errors import PalimpsestError
from palimpsest.statistics.curvature import Factors, eigenbasis, kfac_factors
from pictured import pictures

W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
A, G = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0]))


def net(weight=W, kind=nn.Linear):
    height, width = weight.shape
    module = kind(width, height) if kind is nn.Linear else kind(height, width)
    module.weight.data = weight.clone() if kind is nn.Linear else weight.mT.clone()
    return nn.ModuleDict({"layer": module})


def edited(rho, weight=W, inputs=A, gradients=G, sides="both"):
    network = net(weight)
    cut = SpectrumEdit(network, {"layer": Factors(inputs, gradients, 9)}, sides).apply(rho)["layer"]
    return network["layer"].weight.detach(), cut


def random_factors(seed, out=6, width=5):
    draw = torch.Generator().manual_seed(seed)
    inputs, gradients = (torch.randn(40, n, generator=draw) for n in (width, out))
    weight = torch.randn(out, width, generator=draw)
    return weight, inputs.mT @ inputs / 40, gradients.mT @ gradients / 40


@pytest.mark.parametrize(
    ("rho", "expected"),
    [(0.5, [[1, 0], [0, 0]]), (0.75, [[1, 2], [0, 0]]), (0.76, [[1, 2], [3, 0]]), (0.95, [[1, 2], [3, 4]])],
)
def test_the_pair_that_reaches_the_share_is_the_last_one_kept(rho, expected):
    weight, cut = edited(rho)
    assert torch.allclose(weight, torch.tensor(expected).float(), atol=1e-6)
    assert cut.mass >= rho - 1e-12
    assert cut.pairs == torch.tensor(expected).count_nonzero() / 4


def test_equal_curvature_is_kept_row_by_row():
    kept = kept_pairs(torch.ones(3, 4), 0.5)
    assert kept.flatten().tolist() == [True] * 6 + [False] * 6


@given(seed=st.integers(0, 50), rho=st.floats(0.05, 0.99))
def test_no_pair_more_than_needed_is_kept_and_the_matrix_does_not_grow(seed, rho):
    weight, inputs, gradients = random_factors(seed)
    curvature = torch.outer(eigenbasis(gradients)[0], eigenbasis(inputs)[0])
    kept = kept_pairs(curvature, rho)
    mass = curvature[kept].double()
    total = curvature.sum(dtype=torch.float64)
    assert mass.sum() >= rho * total * (1 - 1e-6)
    assert mass.sum() - mass.min() < rho * total * (1 + 1e-6)
    made, _ = edited(rho, weight, inputs, gradients)
    assert made.norm() <= weight.norm() * (1 + 1e-5)


@pytest.mark.parametrize("side", ["inputs", "gradients"])
def test_the_scale_of_a_factor_does_not_matter(side):
    weight, inputs, gradients = random_factors(1)
    factors = {"inputs": inputs, "gradients": gradients}
    plain, _ = edited(0.7, weight, **factors)
    scaled, _ = edited(0.7, weight, **{**factors, side: factors[side] * 1e3})
    assert torch.allclose(plain, scaled, atol=1e-6)


def test_the_same_edit_twice_is_the_edit_once():
    weight, inputs, gradients = random_factors(2)
    once, _ = edited(0.6, weight, inputs, gradients)
    twice, _ = edited(0.6, once, inputs, gradients)
    assert torch.allclose(once, twice, atol=1e-5)


def test_turning_the_inputs_turns_the_edit():
    weight, inputs, gradients = random_factors(3)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    plain, _ = edited(0.7, weight, inputs, gradients)
    turned, _ = edited(0.7, weight @ turn.mT, turn @ inputs @ turn.mT, gradients)
    assert torch.allclose(plain @ turn.mT, turned, atol=1e-5)


def test_one_side_alone_cuts_whole_directions_of_it():
    weight, inputs, gradients = random_factors(4)
    made, _ = edited(0.8, weight, inputs, gradients, "inputs")
    values, vectors = eigenbasis(inputs)
    # 6 equal rows a direction: the first rows of the last direction that is reached stay
    whole = int(torch.searchsorted(values.cumsum(0), 0.8 * values.sum()))
    rotated = made @ vectors
    assert torch.allclose(rotated[:, :whole], (weight @ vectors)[:, :whole], atol=1e-5)
    assert torch.allclose(rotated[:, whole + 1 :], torch.zeros(6, 5 - whole - 1), atol=1e-5)
    made, _ = edited(0.8, weight, inputs, gradients, "gradients")
    lost = torch.linalg.matrix_rank(weight - made, atol=1e-4)
    assert 1 <= lost < 6


def test_everything_is_kept_bit_by_bit_at_one_even_without_full_rank():
    weight, inputs, gradients = random_factors(5)
    inputs[:, 0] = inputs[0] = 0  # an input that is never active
    made, cut = edited(1.0, weight, inputs, gradients)
    assert torch.equal(made, weight)
    assert (cut.pairs, cut.change) == (1.0, 0.0)
    nearly, _ = edited(0.999999, weight, inputs, gradients)
    assert not torch.allclose(nearly, weight, atol=1e-3)


def test_every_share_starts_from_the_first_weights_and_restore_brings_them_back():
    weight, inputs, gradients = random_factors(6)
    network = net(weight)
    edit = SpectrumEdit(network, {"layer": Factors(inputs, gradients, 9)})
    edit.apply(0.3)
    edit.apply(0.7)
    assert torch.allclose(network["layer"].weight, edited(0.7, weight, inputs, gradients)[0], atol=1e-6)
    edit.restore()
    assert torch.equal(network["layer"].weight, weight)


def test_a_weight_stored_as_its_transpose_is_edited_alike():
    weight, inputs, gradients = random_factors(7)
    network = net(weight, Conv1D)
    SpectrumEdit(network, {"layer": Factors(inputs, gradients, 9, transposed=True)}).apply(0.7)
    assert torch.allclose(network["layer"].weight.mT, edited(0.7, weight, inputs, gradients)[0], atol=1e-6)


def test_spread_counts_the_directions_that_hold_most_of_the_curvature():
    assert spread(torch.tensor([1.0, 94.0, 5.0]), 0.95) == 2
    assert spread(torch.tensor([1.0, 94.0, 5.0]), 0.9) == 1


def test_factors_and_matrices_that_do_not_fit_are_refused():
    broken = A.clone()
    broken[0, 1] = 1
    for inputs, why in (
        (torch.eye(3), r"matrix \(2, 2\), but its factors are for \(2, 3\)"),
        (broken, "not symmetric"),
        (A * torch.nan, "not finite"),
        (torch.zeros(2, 2), "curvature is 0 everywhere"),
    ):
        with pytest.raises(PalimpsestError, match=why):
            edited(0.5, inputs=inputs)
    with pytest.raises(PalimpsestError, match="rho is 0, expected above 0"):
        edited(0)
    with pytest.raises(PalimpsestError, match="square"):
        eigenbasis(torch.ones(2, 3))
    with pytest.raises(PalimpsestError, match="nothing would be edited"):
        SpectrumEdit(net(), {})
    norm = nn.ModuleDict({"layer": nn.LayerNorm(2)})
    with pytest.raises(PalimpsestError, match="layer is a LayerNorm, expected a linear layer"):
        SpectrumEdit(norm, {"layer": Factors(A, G, 9)})


# --- the method


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_method_edits_the_chosen_matrices_and_nothing_else(name):
    model = build_model(name)
    given = pictures() if name == "vit" else data()
    result = LossCurvature().apply(model, given, quiet())
    expected = {
        "llama": {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"},
        "gpt2": {"transformer.h.1.mlp.c_fc"},
    }
    before, after = model.network.state_dict(), result.network.state_dict()
    changed = {n.removesuffix(".weight") for n in before if not torch.equal(before[n], after[n])}
    notes = result.ledger.entries[-1].notes
    assert changed == set(notes["matrices"])
    assert changed == expected.get(name, changed)
    assert len(changed) == {"llama": 2, "gpt2": 1, "vit": 4}[name]
    assert notes["rho"] == (0.75 if name == "vit" else 0.6)
    assert all(0 < share < 1 for share in notes["pairs"].values())


def test_the_method_does_what_the_factors_say():
    model, given = build_model("llama"), data()
    result = LossCurvature(rho=0.8, layers=(0,), matrices=("mlp_down",), labels="gold").apply(model, given, quiet())
    name = "model.layers.0.mlp.down_proj"
    factors = kfac_factors(model, given.train, [name], quiet(), labels="gold", max_length=512).factors
    by_hand = model.copy()
    SpectrumEdit(by_hand.network, factors).apply(0.8)
    assert result.digest() == by_hand.digest()


def test_the_batches_do_not_matter():
    model, given = build_model("llama"), data()
    small, large = (LossCurvature(batch_size=size).apply(model, given, quiet()) for size in (2, 32))
    for one, other in zip(small.network.parameters(), large.network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_mixtures_and_convnets_are_edited_where_they_have_linear_layers():
    moe = LossCurvature().apply(build_model("moe"), data(), quiet()).ledger.entries[-1].notes["matrices"]
    assert all("self_attn" in name for name in moe)
    notes = LossCurvature().apply(build_model("convnet"), pictures(), quiet()).ledger.entries[-1].notes
    assert notes["matrices"] == ["classifier.1"]


def test_rho_of_one_changes_nothing():
    model = build_model("llama")
    assert LossCurvature(rho=1.0).apply(model, data(), quiet()).digest() == model.digest()


def test_text_is_enough_and_few_positions_are_said():
    roles = Roles(general=[Record(text="The cat sat on the mat and looked at the rain .")])
    notes = LossCurvature().apply(build_model("llama"), roles, quiet()).ledger.entries[-1].notes
    assert notes["positions"] == 11
    assert "11 positions are fewer than model.layers.1.mlp.gate_proj has directions" in notes["warnings"][0]


def test_what_cannot_be_edited_is_refused():
    model, given = build_model("llama"), data()
    with pytest.raises(PalimpsestError, match="needs the role train or general or retain"):
        LossCurvature().apply(model, Roles(forget=given.forget), quiet())
    with pytest.raises(PalimpsestError, match="needs the role general"):
        LossCurvature(taken_on="general").apply(model, Roles(train=given.train), quiet())
    with pytest.raises(PalimpsestError, match="expected above 0"):
        LossCurvature(rho=0.0)
    with pytest.raises(PalimpsestError, match=r'"mlp\.gone" match nothing'):
        LossCurvature(matrices=("mlp.gone",)).apply(model, given, quiet())
    with pytest.raises(PalimpsestError, match="expected a linear layer"):
        LossCurvature(matrices=("norm",), layers="all").apply(model, given, quiet())
    with pytest.raises(PalimpsestError, match="no block was named"):
        LossCurvature(layers=()).apply(model, given, quiet())
    once = LossCurvature().apply(model, given, quiet())
    with pytest.raises(PalimpsestError, match=r"gate_proj has been edited by loss-curvature already"):
        LossCurvature(rho=0.9).apply(once, given, quiet())
    again = LossCurvature(layers=(0,)).apply(once, given, quiet())
    assert len(again.ledger.entries) == 2


def test_a_saturated_model_is_warned_about():
    from palimpsest.statistics.curvature import Curvature

    assert "below 0.02" in Curvature({}, 0.01, 1, "gold").warnings[0]
    assert dataclasses.replace(Curvature({}, 0.5, 1, "gold")).warnings == ()
