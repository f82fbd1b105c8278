"""What the loss gains when a block is skipped."""

from __future__ import annotations

import pytest
import torch

from conftest import CAUSAL_LMS, SENTENCES, build_model
from memorised import quiet
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import no_hooks_left
from palimpsest.statistics.bypass import bypass_importance
from palimpsest.statistics.likelihood import sequence_nll


def sequences(model):
    return Encoder.of(model).records([Record(text=text) for text in SENTENCES[:12]])


def mean_nll(model, given) -> float:
    return float(sequence_nll(model, given, quiet()).double().sum()) / sum(len(s.targets) for s in given)


@pytest.mark.parametrize("architecture", CAUSAL_LMS)
def test_it_equals_setting_every_weight_of_the_block_to_zero(architecture):
    model = build_model(architecture)
    given = sequences(model)
    found = bypass_importance(model, given, quiet())
    base = mean_nll(model, given)
    for layer, block in enumerate(anatomy(model.network).blocks()):
        without = model.copy()
        for weight in without.network.get_submodule(block.path).parameters():
            weight.data.zero_()
        assert float(found[layer]) == pytest.approx(mean_nll(without, given) - base, abs=1e-5)


def test_a_block_that_adds_nothing_matters_nothing():
    model = build_model("llama")
    block = model.network.model.layers[1]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    found = bypass_importance(model, sequences(model), quiet())
    assert float(found[1]) == pytest.approx(0.0, abs=1e-7)
    assert abs(float(found[0])) > 1e-4


def test_the_network_is_as_it_was_afterwards(tokens):
    model = build_model("gpt2")
    before, digest = model(tokens).logits, model.digest()
    bypass_importance(model, sequences(model), quiet())
    assert torch.equal(model(tokens).logits, before)
    assert model.digest() == digest
    assert no_hooks_left(model.network)
    assert not any("forward" in vars(module) for module in model.network.modules())


def test_an_empty_set_and_a_loss_that_is_no_number_are_named():
    model = build_model("llama")
    with pytest.raises(PalimpsestError, match="the set that blocks are measured on is empty"):
        bypass_importance(model, [], quiet())
    model.network.model.layers[0].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(PalimpsestError, match="block 0 skipped is not a number"):
        bypass_importance(model, sequences(model), quiet())
