"""SEUF: which expert is chosen, what the anchor pulls at, and that nothing else of the network moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from conftest import _text, build_model, build_tokenizer
from memorised import data, quiet
from palimpsest.data.records import Record
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.erase.seuf import SEUF, anchor_loss, select_experts
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.statistics.experts import expert_usage, routing_overlap
from palimpsest.train import Training

TRAINING = Training(
    learning_rate=1e-2, epochs=10, batch_size=4, max_steps=10, weight_decay=0.1, warmup_epochs=0.0, decay="constant"
)
SHORT = SEUF(training=TRAINING)
AFFINITY = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.6]])


@pytest.fixture(scope="module")
def moe():
    return build_model("moe")


def changed(before, after):
    """The rows of each parameter that differ."""
    found = {}
    for name, weight in after.network.named_parameters():
        rows = (weight != before.network.get_parameter(name)).flatten(1).any(1) if weight.ndim > 1 else None
        if rows is None:
            assert torch.equal(weight, before.network.get_parameter(name)), name
        elif rows.any():
            found[name] = rows.nonzero()[:, 0].tolist()
    return found


def test_the_anchor_is_the_squared_distance_to_the_chosen_expert():
    s = torch.tensor([[0.7, 0.2, 0.1]])
    assert anchor_loss(s, torch.tensor([0])).item() == pytest.approx(0.14)
    assert anchor_loss(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0])).item() == 0
    assert anchor_loss(s.repeat(5, 1), torch.tensor([0])).item() == pytest.approx(0.14)
    assert anchor_loss(s, torch.tensor([0, 1]), 0.5).item() == pytest.approx(0.2**2 + 0.3**2 + 0.1**2)


def test_the_anchor_has_the_right_gradient():
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: anchor_loss(x.softmax(-1), torch.tensor([2])), logits)


def test_a_masked_weight_cannot_bring_back_an_expert_that_is_not_chosen():
    logits = torch.tensor([[3.0, 2.0, 0.0]], requires_grad=True)
    s = logits.softmax(-1)
    masked = s * torch.tensor([[1.0, 1.0, 0.0]])
    assert torch.autograd.grad(masked[0, 2], logits, retain_graph=True)[0].abs().sum() == 0
    on_masked = torch.autograd.grad((masked[0, 2] - 1) ** 2, logits, retain_graph=True)[0]
    on_softmax = torch.autograd.grad((s[0, 2] - 1) ** 2, logits)[0]
    assert on_masked.abs().sum() == 0
    assert on_softmax[0, 2] < 0  # descent raises the logit of the expert


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"count": 1}, [(0, 1)]),
        ({"count": 3}, [(0, 1), (1, 0), (1, 2)]),
        ({"count": 2, "scope": "layer"}, [(0, 1), (0, 2)]),
        ({"count": 1, "scope": "every layer"}, [(0, 1), (1, 2)]),
        ({"count": 1, "choice": "least"}, [(0, 0)]),
    ],
)
def test_experts_are_chosen_by_affinity(settings, expected):
    assert select_experts(AFFINITY, **settings) == expected


def test_random_experts_follow_the_seed():
    drawn = {tuple(select_experts(AFFINITY, 1, choice="random", seed=seed)) for seed in range(20)}
    assert len(drawn) > 2
    assert select_experts(AFFINITY, 2, choice="random", seed=3) == select_experts(AFFINITY, 2, choice="random", seed=3)


@pytest.mark.parametrize("router", ["row", "layer", "none"])
def test_only_the_chosen_expert_and_its_router_move(moe, router):
    """Also under weight decay, and although all experts of a layer are one parameter."""
    result = dataclasses.replace(SHORT, router=router).apply(moe, data(), quiet())
    chosen = select_experts(expert_usage(moe, data().forget, quiet()).affinity, 1)
    ((layer, expert),) = chosen
    inside = f"model.layers.{layer}.mlp"
    expected = {f"{inside}.experts.gate_up_proj": [expert], f"{inside}.experts.down_proj": [expert]}
    rows = {"row": [expert], "layer": [0, 1, 2, 3]}
    if router != "none":
        expected[f"{inside}.gate.weight"] = rows[router]
    assert changed(moe, result) == expected
    notes = result.ledger.entries[-1].notes
    assert notes["experts"] == [f"layer {layer}, expert {expert}"]
    assert 0 < notes["trained_share"] < 0.1
    assert [entry.method for entry in result.ledger.entries] == ["seuf"]


@pytest.mark.parametrize("method", ["gradient-ascent", "gradient-difference", "npo", "simnpo", "rmu"])
def test_every_kind_of_eraser_can_be_confined(moe, method):
    result = dataclasses.replace(SHORT, method=method).apply(moe, data(), quiet())
    assert 1 <= len(changed(moe, result)) <= 3
    assert all(weight.requires_grad for weight in result.network.parameters())
    assert not any("parametrizations" in name for name, _ in result.network.named_modules())


def test_the_anchor_keeps_the_expert_chosen(moe):
    """The share of the router's softmax that the chosen expert has on the forget set rises with the anchor."""
    chosen = select_experts(expert_usage(moe, data().forget, quiet()).affinity, 1)[0]
    shares, longer = {}, dataclasses.replace(TRAINING, epochs=60, max_steps=60)
    for anchor in (0.0, 10.0):
        method = SEUF(anchor=anchor, method="gradient-ascent", training=longer)
        result = method.apply(moe, data(), quiet())
        shares[anchor] = float(expert_usage(result, data().forget, quiet()).share[chosen])
    before = float(expert_usage(moe, data().forget, quiet()).share[chosen])
    assert shares[10.0] > max(before, shares[0.0]) + 0.2


def test_without_anchor_and_with_all_experts_it_is_the_plain_loss_on_them(moe):
    """The same steps as gradient ascent with everything else frozen."""
    training = dataclasses.replace(TRAINING, weight_decay=0.0, max_steps=3)
    everything = SEUF(method="gradient-ascent", experts=8, anchor=0.0, router="layer", training=training)
    result = everything.apply(moe, data(), quiet())
    frozen = moe.copy()
    for name, weight in frozen.network.named_parameters():
        weight.requires_grad_(".mlp." in name)
    plain = GradientAscent(training=training).apply(frozen, data(), quiet())
    for name, weight in result.network.named_parameters():
        torch.testing.assert_close(weight, plain.network.get_parameter(name), atol=1e-5, rtol=1e-4, msg=name)


def test_a_single_expert_is_the_feed_forward_network_itself():
    """N = K = 1: the softmax is 1 at the only expert, so the anchor is 0 whatever its weight."""
    experts = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "norm_topk_prob": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_text(**experts)))
    dense = Model(network.eval(), build_tokenizer())
    one, other = (
        dataclasses.replace(SHORT, anchor=anchor, method="gradient-ascent").apply(dense, data(), quiet())
        for anchor in (0.0, 100.0)
    )
    assert one.digest() == other.digest() != dense.digest()


def test_a_model_agrees_with_its_own_routing(moe):
    records = data().forget
    assert routing_overlap(moe, moe, records, quiet()) == 1
    moved = moe.copy()
    with torch.no_grad():
        moved.network.get_parameter("model.layers.0.mlp.gate.weight").neg_()
    overlap = routing_overlap(moved, moe, records, quiet())
    assert 0 <= overlap < 0.8
    assert routing_overlap(moved, moe, records, quiet(), batch_size=1) == pytest.approx(overlap)


def test_the_shift_of_the_routing_is_noted(moe):
    result = SHORT.apply(moe, data(), quiet())
    notes = result.ledger.entries[-1].notes
    assert set(notes["routing_overlap"]) == {"forget", "retain"}
    assert notes["routing_overlap"]["forget"] == pytest.approx(
        routing_overlap(result, moe, data().forget, quiet()), abs=1e-6
    )
    assert torch.tensor(notes["affinity"]).shape == (2, 4)


def test_few_tokens_are_said(moe):
    ascent = dataclasses.replace(SHORT, method="gradient-ascent")
    warnings = ascent.apply(moe, data(), quiet()).ledger.entries[-1].notes["warnings"]
    assert any("fewer than 1000 are noisy" in text for text in warnings)
    many = data().replace(forget=[Record(text="The cat sat on the mat and looked at the rain . " * 8)] * 12)
    warnings = ascent.apply(moe, many, quiet()).ledger.entries[-1].notes.get("warnings", [])
    assert not any("are noisy" in text for text in warnings)


def test_a_router_that_uses_all_alike_is_warned_about(moe):
    near = expert_usage(moe, data().forget, quiet())
    flat = dataclasses.replace(near, affinity=torch.full((2, 4), 0.25))
    run = quiet()
    SHORT._doubt(flat, [(0, 1)], run)
    assert "used 1.00 times as much as on average" in run.notes["warnings"][0]


def test_the_sample_ends_when_it_has_the_tokens(moe):
    whole = SHORT._sample(moe, data().forget, quiet())
    part = dataclasses.replace(SHORT, attribution_tokens=10)._sample(moe, data().forget, quiet())
    assert len(whole) == 4
    assert len(part) == 1


def test_noise_in_the_router_is_off_while_it_trains():
    from palimpsest.erase.seuf import _without_jitter

    module = torch.nn.Linear(2, 2)
    module.jitter_noise = 0.1
    network = torch.nn.ModuleDict({"gate": module})
    with _without_jitter(network):
        assert module.jitter_noise == 0
    assert module.jitter_noise == 0.1


def test_bad_input(moe, llama):
    with pytest.raises(PalimpsestError, match="seuf takes a mixture-of-experts, but LlamaForCausalLM is a causal-lm"):
        SHORT.apply(llama, data(), quiet())
    with pytest.raises(PalimpsestError, match="experts is 9, expected 1 to 8"):
        dataclasses.replace(SHORT, experts=9).apply(moe, data(), quiet())
    with pytest.raises(PalimpsestError, match="experts is 5, expected 1 to 4"):
        dataclasses.replace(SHORT, experts=5, scope="layer").apply(moe, data(), quiet())
    with pytest.raises(PalimpsestError, match="expected an eraser that trains"):
        SEUF(method="ssd")
    with pytest.raises(PalimpsestError, match="expected an eraser that trains"):
        SEUF(method="finetune")
    with pytest.raises(PalimpsestError, match="no system 'gradient-asent'"):
        SEUF(method="gradient-asent")
    with pytest.raises(PalimpsestError, match=r"lora_rank to 0"):
        SEUF(training=dataclasses.replace(TRAINING, lora_rank=2))
    with pytest.raises(PalimpsestError, match='needs the role "retain"'):
        SHORT.apply(moe, data().replace(retain=None), quiet())
    with pytest.raises(PalimpsestError, match="no routed experts"):
        routing_overlap(llama, moe, data().forget, quiet())


@pytest.mark.parametrize("method", ["selective-amnesia", "balanced-subnet", "retrain", "uld", "whp-decode", "seuf"])
def test_erasers_that_do_not_train_what_they_are_given_are_refused(method):
    with pytest.raises(PalimpsestError, match="expected an eraser that trains the weights it is given"):
        SEUF(method=method)


def test_steps_without_forget_answers_have_no_anchor(moe):
    short = dataclasses.replace(TRAINING, max_steps=None, epochs=2)
    for method, told in (("scrub", False), ("po", True)):
        after = SEUF(method=method, training=short).apply(moe, data(), quiet())
        warnings = after.ledger.entries[-1].notes["warnings"]
        assert any("the anchor never acted" in text for text in warnings) == told
