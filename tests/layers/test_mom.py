"""Mixture of memories: what is routed apart cannot interfere, and the packed form is the plain one."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from palimpsest.errors import PalimpsestError
from palimpsest.layers.mom import MixtureOfMemories, balance, naive_mixture
from palimpsest.layers.recurrences import Inputs, Rule, naive_recurrence

KINDS = {
    "one memory": {"memories": 1, "top_k": 1, "shared": False},
    "two of four and a shared one": {},
    "one projection for all": {"single_kv": True, "shared": False},
    "all of three": {"memories": 3, "top_k": 3},
    "no convolution": {"convolution": 1},
}


def layer(**settings) -> MixtureOfMemories:
    torch.manual_seed(0)
    mixer = MixtureOfMemories(12, 2, **{"chunk": 4, "value_width": 5, **settings}).double()
    if mixer.router is not None:
        mixer.router.weight.data *= 20  # decided routing
    return mixer


@pytest.fixture
def hidden():
    return torch.randn(3, 23, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", get_args(Rule))
def test_packed_chunks_give_what_single_tokens_and_memories_give(rule, kind, hidden):
    mixer = layer(rule=rule, **KINDS[kind])
    whole, end = mixer(hidden)
    torch.testing.assert_close(whole, naive_mixture(mixer, hidden), rtol=0, atol=1e-12)
    state, outputs = mixer.start(3), []
    for x in hidden.unbind(1):
        out, state = mixer.step(x, state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=0, atol=1e-12)
    for name, tensor in end.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-12)


def test_a_memory_that_gets_nothing_and_one_that_gets_everything(hidden):
    mixer = layer(memories=3, top_k=1)
    ones = torch.cat([hidden, torch.ones(3, 23, 1, dtype=torch.float64)], -1)[..., 1:]
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[1, -1] = 100.0
    out, end = mixer(ones)
    assert (mixer.route(ones)[0][..., 0] == 1).all()
    assert not end["memories"][:, [0, 2]].any()
    torch.testing.assert_close(out, naive_mixture(mixer, ones), rtol=0, atol=1e-12)


def test_with_equal_projections_seeing_everything_is_one_memory(hidden):
    mixer = layer(memories=3, top_k=3, shared=False)
    single = layer(memories=1, top_k=1, shared=False)
    with torch.no_grad():
        mixer.into.copy_(mixer.into[:1].expand_as(mixer.into))
    weights = {name: w for name, w in mixer.state_dict().items() if name != "router.weight"}
    single.load_state_dict(weights | {"into": mixer.into[:1]})
    torch.testing.assert_close(mixer(hidden)[0], single(hidden)[0], rtol=0, atol=1e-12)


def test_the_names_of_memories_do_not_matter(hidden):
    mixer, other = layer(), layer()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        other.router.weight.copy_(mixer.router.weight[order])
        other.into[:4] = mixer.into[order]
    torch.testing.assert_close(other(hidden)[0], mixer(hidden)[0], rtol=0, atol=1e-12)


def test_a_memory_that_is_not_chosen_stays_bit_for_bit(hidden):
    mixer = layer()
    _, state = mixer(hidden[:, :-1])
    _, after = mixer.step(hidden[:, -1], state)
    chosen = mixer.route(hidden[:, -1:])[0][:, 0]
    touched = torch.zeros(3, 5, dtype=torch.bool).scatter_(1, chosen, True)
    for name in state:
        same = (state[name] == after[name]).flatten(2).all(-1)
        assert same[~touched].all()
        assert not same[touched].any()


@pytest.mark.parametrize("training", [True, False])
def test_neither_later_tokens_nor_other_rows_change_an_output(training, hidden):
    mixer = layer().train(training)
    changed = hidden.clone()
    changed[0, 12] += 1
    before, after = mixer(hidden)[0], mixer(changed)[0]
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-14)
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=1e-14)
    assert not torch.allclose(before[0, 12:], after[0, 12:])


def test_padding_after_a_row_is_never_written(hidden):
    mixer = layer()
    mask = torch.ones(3, 23, dtype=torch.bool)
    mask[1, 9:] = False
    out, state = mixer(torch.where(mask[..., None], hidden, 99.0), None, mask)
    expected, own = mixer(hidden[1:2, :9])
    torch.testing.assert_close(out[1:2, :9], expected, rtol=0, atol=1e-12)
    for name in state:
        torch.testing.assert_close(state[name][1:2], own[name], rtol=0, atol=1e-12)


def test_the_balance_loss_leaves_padding_out(hidden):
    mixer = layer()
    mask = torch.zeros(3, 23, dtype=torch.bool)
    mask[0, :9] = True
    mixer(hidden, None, mask)
    found = mixer.penalty
    mixer(hidden[:1, :9])
    torch.testing.assert_close(found, mixer.penalty)


def test_balance_by_hand():
    p = torch.full((4, 4), 0.25)
    even = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    assert balance(p, even).item() == pytest.approx(2.0)
    sided = torch.tensor([[0.5, 0.5, 0, 0]]).expand(4, 4)
    assert balance(sided, torch.tensor([[0, 1]]).expand(4, 2)).item() == pytest.approx(4.0)


def test_tokens_routed_apart_do_not_interfere():
    tokens = [(1.0, 2.0, 0), (1.0, 5.0, 1), (1.0, 3.0, 0)]

    def read(separate: bool) -> list[float]:
        memories, out = torch.zeros(2, 1, 1, 1), []
        for k, v, m in tokens:
            m = m if separate else 0
            x = Inputs(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), k), torch.full((1, 1, 1, 1), v))
            y, memories[m : m + 1] = naive_recurrence(x, memories[m : m + 1])
            out.append(y.item())
        return out

    assert read(separate=True) == [2, 5, 5]
    assert read(separate=False) == [2, 7, 10]


def test_the_router_learns_from_the_output_and_a_frozen_one_does_not(hidden):
    mixer, frozen = layer(), layer(learned_router=False)
    for each in (mixer, frozen):
        each(hidden)[0].square().sum().backward()
    assert mixer.router.weight.grad.any()
    assert frozen.router.weight.grad is None


def test_decay_starts_between_none_and_sixteen_times_the_step():
    mixer = MixtureOfMemories(64, 16)
    rate, step = mixer.log_rate.exp(), F.softplus(mixer.step_bias)
    assert rate.min() > 0
    assert rate.max() <= 16
    assert step.min() >= 1e-4
    assert step.max() <= 0.1 + 1e-6


def test_it_can_be_copied_after_a_pass_that_is_part_of_a_graph(hidden):
    mixer = layer()
    mixer(hidden)
    assert mixer.penalty.requires_grad
    assert copy.deepcopy(mixer).penalty is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 5}, "top_k is 5 of 4 memories"),
        ({"top_k": 0}, "top_k is 0"),
        ({"memories": 0, "top_k": 0}, "top_k is 0 of 0"),
        ({"rule": "gated_delta"}, "rule is 'gated_delta'. Did you mean"),
        ({"convolution": 0}, "convolution is 0"),
        ({"heads": 5}, "width 12 does not give 5 heads"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(PalimpsestError, match=words):
        MixtureOfMemories(12, **{"heads": 2, **settings})


def test_a_state_mask_or_router_that_does_not_fit_is_named(hidden):
    mixer = layer()
    with pytest.raises(PalimpsestError, match=r"the state is of \(2, 5\) .*, expected \(3, 5\)"):
        mixer(hidden, mixer.start(2))
    with pytest.raises(PalimpsestError, match=r"mask has shape \[3, 4\], expected \[3, 23\]"):
        mixer(hidden, None, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(PalimpsestError, match="not numbers"):
        mixer(hidden * torch.nan)


def test_rows_without_a_real_token_leave_the_memories_as_they_were():
    mixer = layer()
    _, state = mixer(torch.randn(2, 5, 12).double())
    _, after = mixer(torch.randn(2, 3, 12).double(), state, torch.zeros(2, 3, dtype=torch.bool))
    assert all(torch.equal(after[name], state[name]) for name in state)
