"""The balanced subnet: its mask, how the mask learns, and what is left of the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import build_model
from memorised import data, quiet
from palimpsest.audit.classification import predicted
from palimpsest.erase.balanced_subnet import BalancedSubnet, Masked, mask
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune
from pictured import pictures

SHORT = Training(learning_rate=0.1, epochs=3, batch_size=6, weight_decay=0.0, warmup_epochs=0.0, decay="constant")


def test_the_smallest_scores_are_switched_off_whatever_their_sign():
    scores = torch.tensor([[0.1, -0.9], [0.5, -0.2]])
    assert mask(scores, 0.5).tolist() == [[0, 1], [1, 0]]
    assert mask(scores, 0.25).tolist() == [[0, 1], [1, 1]]


@given(seed=st.integers(0, 30), ratio=st.floats(0.01, 0.9))
def test_every_matrix_loses_the_same_share(seed, ratio):
    scores = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(seed))
    off = (mask(scores, ratio) == 0).flatten(1).sum(1)
    assert off.tolist() == [round(ratio * 40)] * 3


def test_the_gradient_passes_straight_through_to_the_scores():
    weight, given_ = torch.tensor([[2.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    masked = Masked(weight, 0.5, torch.Generator().manual_seed(0))
    masked.scores.data = torch.tensor([[0.1, -0.4]])
    (masked(weight) * given_).sum().backward()
    # d loss / d s = (gradient at the masked weight) theta sign(s), for weights that are off as well
    assert torch.allclose(masked.scores.grad, torch.tensor([[10.0, -21.0]]))


def test_the_rest_of_the_model_stays_and_the_share_of_the_mlp_is_zero(llama):
    result = BalancedSubnet(ratio=0.1, training=SHORT).apply(llama, data(), quiet())
    assert not any("parametrizations" in name for name, _ in result.network.named_parameters())
    for name, weight in result.network.named_parameters():
        before = llama.network.get_parameter(name)
        if ".mlp." in name:
            off = weight == 0
            assert int(off.sum()) == round(0.1 * weight.numel())
            assert torch.equal(weight[~off], before[~off])
        else:
            assert torch.equal(weight, before)
        assert weight.requires_grad


def test_what_is_to_go_becomes_less_likely_than_what_stays(llama):
    from palimpsest.audit.answer_probability import probabilities

    given_ = data()
    learn = Training(learning_rate=5e-3, epochs=60, batch_size=6, warmup_epochs=0.0, weight_decay=0.0)
    knows = Finetune(training=learn).apply(llama, given_, quiet())
    method = BalancedSubnet(
        ratio=0.1, retain_weight=0.5, training=dataclasses.replace(SHORT, epochs=30, learning_rate=0.5)
    )
    result = method.apply(knows, given_, quiet())
    kept = {
        role: probabilities(result, given_[role], quiet()).mean() / probabilities(knows, given_[role], quiet()).mean()
        for role in ("forget", "retain")
    }
    assert kept["forget"] < 0.5 * kept["retain"]


@pytest.mark.parametrize("micro_tokens", [16, 4096])
def test_how_a_step_is_cut_does_not_matter(llama, micro_tokens):
    short = dataclasses.replace(SHORT, epochs=1, max_steps=1, micro_tokens=micro_tokens)
    result = BalancedSubnet(ratio=0.1, training=short).apply(llama, data(), quiet())
    whole = BalancedSubnet(ratio=0.1, training=dataclasses.replace(short, micro_tokens=100_000)).apply(
        llama, data(), quiet()
    )
    same = [torch.equal(a, b) for a, b in zip(result.network.parameters(), whole.network.parameters(), strict=True)]
    assert all(same)


def test_a_classifier_loses_what_it_was_told_to():
    vit = build_model("vit")
    roles = pictures()
    learn = Training(learning_rate=5e-3, epochs=40, batch_size=8, warmup_epochs=0.0, weight_decay=0.0)
    knows = Finetune(training=learn).apply(vit, roles, quiet())
    hard = dataclasses.replace(SHORT, epochs=30, learning_rate=5.0)
    result = BalancedSubnet(ratio=0.5, retain_weight=0.1, training=hard).apply(knows, roles, quiet())
    loss = {
        role: [float(predicted(m, roles[role], quiet()).nll.mean()) for m in (knows, result)]
        for role in ("forget", "retain")
    }
    assert loss["forget"][1] - loss["forget"][0] > 0.1
    assert loss["retain"][1] - loss["retain"][0] < 0.01


def test_of_a_network_without_mlps_each_convolution_loses_its_share():
    result = BalancedSubnet(ratio=0.1, training=SHORT).apply(build_model("convnet"), pictures(), quiet())
    kernels = [w for _, w in result.network.named_parameters() if w.ndim == 4]
    assert [int((w == 0).sum()) for w in kernels] == [round(0.1 * w.numel()) for w in kernels]


def test_experts_lose_their_share_each():
    result = BalancedSubnet(ratio=0.25, training=SHORT).apply(build_model("moe"), data(), quiet())
    weight = result.network.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert ((weight == 0).flatten(1).float().mean(1) == 0.25).all()


def test_bad_settings_are_refused(llama):
    for settings, why in (
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 1.0}, "below 1"),
        ({"retain_weight": 2.0}, "at most"),
    ):
        with pytest.raises(PalimpsestError, match=why):
            BalancedSubnet(**settings)
    with pytest.raises(PalimpsestError, match="set lora_rank to 0"):
        BalancedSubnet(training=dataclasses.replace(SHORT, lora_rank=2)).apply(llama, data(), quiet())
