"""The neural memory as a layer: one sequence in any number of pieces, padding, batches, gradients, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import PalimpsestError
from palimpsest.layers import State, neural_memory
from palimpsest.layers.gradient_memory import naive_memory
from palimpsest.layers.neural_memory import NeuralMemory

SETTINGS = (
    {},
    {"depth": 1},
    {"depth": 3, "expansion": 1.5},
    {"chunk": 1},
    {"momentum": False},
    {"decay": False, "convolution": 1},
    {"theta_max": 0.6, "chunk": 3, "clip": 0.5},
    {"clip": None, "readout": False},
)
every_setting = pytest.mark.parametrize("chosen", SETTINGS, ids=str)


def layer(**chosen: Any) -> NeuralMemory:
    torch.manual_seed(0)
    made = NeuralMemory(8, 2, **{"chunk": 4, **chosen}).double()
    with torch.no_grad():  # gates that differ between tokens
        made.gates.weight.normal_()
        made.gate_bias.add_(1)
    return made


def tokens(time: int, batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, time, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@every_setting
def test_the_layer_is_the_token_by_token_rule(chosen, monkeypatch):
    made, x = layer(**chosen), tokens(11)

    def run() -> list[torch.Tensor]:
        y, state = made(x)
        return [
            y,
            *torch.autograd.grad((y * torch.linspace(-1, 1, 8)).sum() + state["weights_0"].sum(), made.parameters()),
        ]

    fast = run()
    monkeypatch.setattr(neural_memory, "chunk_memory", naive_memory)
    for one, other in zip(run(), fast, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@every_setting
def test_decoding_gives_what_one_pass_gives(chosen):
    made, x = layer(**chosen), tokens(11)
    whole, end = made(x)
    for prefill in (0, 4, 6):
        state = made(x[:, :prefill])[1] if prefill else made.start(3)
        for t in range(prefill, 11):
            y, state = made.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t], rtol=1e-10, atol=1e-10)
        same(state, end)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=6, max_size=6))
def test_padded_rows_are_the_rows_alone_and_go_on_from_there(lengths):
    """Two calls of rows of different lengths, so that the second begins at a place of its own in each row's chunk."""
    made, first, second = layer(), tokens(7), tokens(7, seed=2)
    before, after = torch.tensor(lengths[:3]), torch.tensor(lengths[3:])
    place = torch.arange(7)
    y1, middle = made(first, None, place < before[:, None])
    y2, end = made(second, middle, place < after[:, None])
    for row in range(3):
        state = made.start(1)
        for x, y, n in ((first, y1, before[row]), (second, y2, after[row])):
            if n:
                alone, state = made(x[row : row + 1, :n], state)
                torch.testing.assert_close(y[row : row + 1, :n], alone, rtol=1e-10, atol=1e-10)
        same({name: part[row : row + 1] for name, part in end.items()}, state)


def test_no_token_sees_a_later_one_or_another_row():
    made, x = layer(), tokens(11)
    y, _ = made(x)
    changed = x.clone()
    changed[1, 6] += 1
    difference = (made(changed)[0] - y).abs().amax(-1)
    assert difference[[0, 2]].max() == 0
    assert difference[1, :6].max() == 0
    assert difference[1, 6:].min() > 0
    torch.testing.assert_close(made(x[1:2])[0], y[1:2])


def test_what_was_read_is_recalled():
    """With the step of a projection the last value is read back exactly; without steps it is not."""
    made = layer(depth=1, chunk=1, theta_max=1.0, momentum=False, decay=False, readout=False, convolution=1)
    with torch.no_grad():
        made.gates.weight.zero_()
        made.gate_bias.zero_()  # theta is 1/2
        made.query_key_value.weight[:8] = made.query_key_value.weight[8:16]
        made.filters[:8] = made.filters[8:16]
    x = tokens(5)
    y, _ = made(x)
    v = x @ made.query_key_value.weight[16:].T * made.filters[16:, 0, 0]
    torch.testing.assert_close(y, torch.nn.functional.silu(v) / 2)  # values are divided by the root of their width, 4
    with torch.no_grad():
        made.gate_bias.fill_(-1e9)
    assert made(x)[0].abs().max() == 0


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("momentum", [-50.0, 0.0, 3.0])
def test_a_matrix_stays_finite_even_where_all_keys_are_equal(chunk, momentum):
    """The greatest step that the gates allow, with little and much momentum, and one token for ever."""
    made, x = NeuralMemory(8, 2, depth=1, chunk=chunk, readout=False).double(), tokens(1).expand(-1, 60 * chunk, -1)
    with torch.no_grad():
        made.gates.weight.zero_()
        made.gate_bias.copy_(torch.tensor([[5.0], [-50.0], [momentum]]))
        y, _ = made(x)
        v = (made._inputs(x, made.start(3)["tail"], None)[0].v).abs().max()
    assert y.abs().max() < 2.5 * v


@every_setting
def test_every_weight_learns(chosen):
    made = layer(**chosen)
    made(tokens(9))[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in made.parameters())


def test_the_state_keeps_its_size_and_the_memory_its_precision():
    made = NeuralMemory(8, 2, chunk=4).bfloat16()
    y, state = made(tokens(9).bfloat16())
    assert y.dtype == torch.bfloat16
    assert all(state[name].dtype == torch.float32 for name in made._names())
    sizes = [sum(x.numel() for x in made(tokens(n).bfloat16())[1].values()) for n in (1, 9, 40)]
    assert len(set(sizes)) == 1


def test_gates_and_surprise_are_there_to_look_at():
    made = layer(theta_max=0.25)
    made.tracing = True
    made(tokens(9))
    assert {name: tuple(x.shape) for name, x in made.trace.items()} == dict.fromkeys(
        ("forget", "momentum", "step", "surprise"), (3, 2, 9)
    )
    assert 0 < made.trace["step"].min() < made.trace["step"].max() < 0.25
    assert copy.deepcopy(made).trace is None
    assert NeuralMemory(8, chunk=8).theta_max == 1 / 8


def test_bad_input_is_named():
    made, x = layer(), tokens(6)
    state = made(x)[1]
    with pytest.raises(PalimpsestError, match="a batch of 3, but the input of 2"):
        made(x[:2], state)
    with pytest.raises(PalimpsestError, match="inside a chunk of 4 tokens, but this layer has chunks of 1"):
        layer(chunk=1).step(x[:, 0], state)
    assert torch.isfinite(layer(chunk=1)(x, made(x[:, :4])[1])[0]).all()  # where a chunk ends they may change
    with pytest.raises(PalimpsestError, match="has no momentum_0"):
        made(x, layer(momentum=False)(x)[1])
    with pytest.raises(PalimpsestError, match="width 4, expected 8"):
        made(x[..., :4])
    with pytest.raises(PalimpsestError, match="padding must stand after"):
        made(x, None, torch.tensor([[False] + [True] * 5] * 3))
    with pytest.raises(PalimpsestError, match=r"mask has shape \[3, 5\], expected \[3, 6\]"):
        made(x, None, torch.ones(3, 5, dtype=torch.bool))
    state["weights_0"] = state["weights_0"] * float("nan")
    with pytest.raises(PalimpsestError, match="not finite after chunk 0"):
        made(x, state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk": 0}, "chunk is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 3}, "does not give 3 heads"),
        ({"theta_max": 0.0}, "theta_max is 0.0, expected above 0"),
        ({"clip": 0.0}, "clip is 0.0, expected above 0"),
        ({"expansion": 0.1}, "hidden width of 0"),
    ],
)
def test_settings_that_make_no_layer_are_refused(wrong, message):
    with pytest.raises(PalimpsestError, match=message):
        NeuralMemory(8, **{"heads": 2, **wrong})
