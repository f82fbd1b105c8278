"""The variants of Titans: what they compute, in one pass and token by token, and what no token may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palimpsest.errors import PalimpsestError
from palimpsest.layers.attention import rotate
from palimpsest.layers.titans import MemoryAsContext, MemoryAsGate, titans_mixer

VARIANTS = ("memory-only", "mac", "mag", "mal")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def mixer(variant: str, **chosen: Any) -> Any:
    torch.manual_seed(0)
    window = {} if variant == "memory-only" else {"window": 6}
    return titans_mixer(8, 2, variant=variant, **{"chunk": 4, "persistent": 3, **window, **chosen}).double()


def tokens(time: int, batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, time, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class Open(torch.nn.Module):
    """In the place of a norm before a sigmoid: the gate is 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 1e9)


@every_variant
@pytest.mark.parametrize("chosen", [{}, {"persistent": 0}, {"chunk": 5, "depth": 1}, {"chunk": 32}], ids=str)
def test_decoding_gives_what_one_pass_gives(variant, chosen):
    made, x = mixer(variant, **chosen), tokens(17)
    whole, end = made(x)
    for prefill in (0, 6, 8):
        state = made(x[:, :prefill])[1] if prefill else made.start(3)
        for t in range(prefill, 17):
            y, state = made.step(x[:, t], state)
            torch.testing.assert_close(y, whole[:, t], rtol=1e-10, atol=1e-10)
        same(state, end)
    first, state = made(x[:, :7])
    second, state = made(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    same(state, end)


@every_variant
@pytest.mark.parametrize("lengths", [(5, 17, 8), (1, 6, 12), (17, 0, 3)])
def test_padded_rows_are_the_rows_alone_and_go_on_from_there(variant, lengths):
    made, first, second, more = mixer(variant), tokens(17), tokens(9, seed=2), (9, 2, 5)
    y1, middle = made(first, None, torch.arange(17) < torch.tensor(lengths)[:, None])
    y2, end = made(second, middle, torch.arange(9) < torch.tensor(more)[:, None])
    for row in range(3):
        state = made.start(1)
        for x, y, n in ((first, y1, lengths[row]), (second, y2, more[row])):
            if n:
                alone, state = made(x[row : row + 1, :n], state)
                torch.testing.assert_close(y[row : row + 1, :n], alone, rtol=1e-10, atol=1e-10)
        same({name: part[row : row + 1] for name, part in end.items()}, state)


@every_variant
@pytest.mark.parametrize("at", [5, 6, 9])
def test_no_token_sees_a_later_one_or_another_row(variant, at):
    made, x = mixer(variant), tokens(17)
    changed = x.clone()
    changed[1, at] += 1
    difference = (made(changed)[0] - made(x)[0]).abs().amax(-1)
    assert difference[[0, 2]].max() == 0
    assert difference[1, :at].max() == 0
    assert difference[1, at:].min() > 0


@every_variant
def test_every_weight_learns_and_what_is_far_back_is_remembered(variant):
    made, x = mixer(variant), tokens(40, 1).requires_grad_()
    y, state = made(x)
    y[:, -1].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in made.parameters())
    assert x.grad[0, :20].abs().amax(-1).min() > 0  # windows and segments are 6 tokens long
    assert sum(v.numel() for v in state.values()) == sum(v.numel() for v in made(x[:, :2])[1].values())


def test_mag_runs_both_branches_over_the_persistent_tokens_and_the_input():
    made, x = mixer("mag"), tokens(11)
    fixed = made.attention.persistent.expand(3, -1, -1)
    m, _ = made.memory(torch.cat([fixed, x], 1))
    y, _ = made.attention(x)
    expected = made.gating.output(made.gating.output_norm(y) * made.gating.memory_norm(m[:, 3:]).sigmoid())
    torch.testing.assert_close(made(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_mag_with_an_open_gate_is_normalised_window_attention():
    made, x = mixer("mag"), tokens(11)
    made.gating.memory_norm = Open()
    y, _ = made.attention(x)
    torch.testing.assert_close(made(x)[0], made.gating.output(made.gating.output_norm(y)))


def test_mal_is_attention_over_the_memory_layer():
    made, x = mixer("mal"), tokens(11)
    m, _ = made.memory(torch.cat([made.persistent.expand(3, -1, -1), x], 1))
    torch.testing.assert_close(made(x)[0], made.attention(m[:, 3:])[0], rtol=1e-10, atol=1e-10)


def naive_context(layer: MemoryAsContext, x: torch.Tensor) -> torch.Tensor:
    """Memory as context as its equations read, one token of one sequence at a time."""
    out, attention, c = [], layer.attention, layer.window
    for row in x:
        state = layer.memory.start(1)
        past = row.new_zeros(1, 3, 8)
        for start in range(0, len(row), c):
            segment = row[None, start : start + c]
            q, past = layer.memory.queries(segment, past, torch.tensor([segment.shape[1]]))
            h = layer.memory.recalled(q, [state[f"weights_{i}"] for i in range(2)]).flatten(2)
            fixed = attention.persistent
            for t in range(segment.shape[1]):
                seen = torch.cat([fixed, h[0, : t + 1], segment[0, : t + 1]])
                places = torch.cat([torch.arange(t + 1), c + torch.arange(t + 1)])[None]
                _, k, v = attention.projected(seen[None])
                query = attention.projected(segment[:, t : t + 1])[0]
                k = torch.cat([k[:, :, : len(fixed)], rotate(k[:, :, len(fixed) :], places)], 2)
                turned = rotate(query, torch.tensor([[c + t]]))
                scores = torch.cat([query @ k[:, :, : len(fixed)].mT, turned @ k[:, :, len(fixed) :].mT], -1)
                z = ((scores / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)  # heads of width 4
                z = attention.output(z)
                m, state = layer.memory.step(z[:, 0], state)
                out.append(layer.gating(z, m[:, None])[0, 0])
    return torch.stack(out).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("time", [6, 15])
def test_mac_is_its_equations_token_by_token(time):
    made, x = mixer("mac"), tokens(time)
    naive, fast = naive_context(made, x), made(x)[0]
    torch.testing.assert_close(fast, naive, rtol=1e-10, atol=1e-10)
    weights = list(made.parameters())
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (naive, fast)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_mac_without_recall_is_segment_attention_with_persistent_tokens():
    made, x = mixer("mac", recall=False), tokens(15)
    made.gating.memory_norm = Open()
    segments = [made.attention(x[:, i : i + 6])[0] for i in range(0, 15, 6)]
    expected = made.gating.output(made.gating.output_norm(torch.cat(segments, 1)))
    torch.testing.assert_close(made(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_mac_recalls_from_the_memory_as_the_last_segment_left_it():
    made, x = mixer("mac"), tokens(9)
    state = made(x)[1]
    _, at_end = made(x[:, :6])
    assert torch.equal(state["begun_0"], at_end["memory.weights_0"])
    assert not torch.equal(state["memory.weights_0"], at_end["memory.weights_0"])


def test_persistent_tokens_change_what_is_computed():
    for variant in VARIANTS:
        made, x = mixer(variant), tokens(5)
        before = made(x)[0]
        fixed = made.attention.persistent if variant in ("mac", "mag") else made.persistent
        with torch.no_grad():
            fixed.add_(1)
        assert (made(x)[0] - before).abs().amax(-1).min() > 0


def test_gates_are_there_to_look_at():
    made = mixer("mag")
    assert isinstance(made, MemoryAsGate)
    made(tokens(5))
    assert made.trace["step"].shape == (3, 2, 5)


def test_bad_input_is_named():
    x = tokens(5)
    with pytest.raises(PalimpsestError, match=r"variant is 'max'\. Did you mean"):
        titans_mixer(8, 2, variant="max")
    with pytest.raises(PalimpsestError, match="window is 0"):
        mixer("mac", window=0)
    for variant in ("memory-only", "mal", "mag", "mac"):
        with pytest.raises(PalimpsestError, match="persistent is -1"):
            mixer(variant, persistent=-1)
        made = mixer(variant)
        with pytest.raises(PalimpsestError, match="a batch of 3, but the input of 2"):
            made(x[:2], made(x)[1])
    with pytest.raises(PalimpsestError, match="the state has no memory: it is of another layer"):
        mixer("mac")(x, mixer("memory-only")(x)[1])
    with pytest.raises(PalimpsestError, match="segments of 6 tokens, but this layer of 4"):
        mixer("mac", window=4)(x, mixer("mac")(x)[1])


@every_variant
def test_an_adapter_on_every_linear_layer_is_what_it_is_merged_into(variant):
    from peft import LoraConfig, inject_adapter_in_model

    layer = mixer(variant)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), layer)
    layers = [module for module in layer.modules() if hasattr(module, "lora_B")]
    for module in layers:
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3)
    layer.double()
    beside, _ = layer(tokens(13))
    for module in layers:
        module.merge()
    merged, _ = layer(tokens(13))
    torch.testing.assert_close(beside, merged, rtol=1e-8, atol=1e-8)
