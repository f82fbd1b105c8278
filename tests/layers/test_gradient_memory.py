"""The rule of a neural memory: worked numbers, limits, and the chunk form against the token-by-token form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import PalimpsestError
from palimpsest.layers.gradient_memory import (
    Inputs,
    Memory,
    chunk_memory,
    fresh,
    naive_memory,
    products,
    recall,
    surprises,
)
from palimpsest.layers.stream_memory import StreamMemory

FORMS = pytest.mark.parametrize("form", [naive_memory, chunk_memory])


def drawn(rows: int, time: int, sizes: list[int], seed: int = 0, **gates: float) -> tuple[Inputs, Memory]:
    """Random inputs, keys and queries of length 1, and a memory that has momentum from before."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(rows, time, sizes[0]), dim=-1) for _ in "qk")
    alpha, eta, theta = (torch.rand(rows, time, generator=rng, dtype=torch.float64) for _ in range(3))
    alpha, eta, theta = alpha * gates.get("alpha", 0.3), eta * gates.get("eta", 0.9), theta * gates.get("theta", 0.05)
    weights = [normal(rows, *size) / size[0] ** 0.5 for size in itertools.pairwise(sizes)]
    memory = fresh(weights)._replace(momentum=[0.1 * normal(*w.shape) for w in weights])
    return Inputs(q, k, normal(rows, time, sizes[-1]), theta, alpha, eta), memory


def tensors(memory: Memory) -> list[torch.Tensor]:
    return [*memory.weights, *memory.momentum, *memory.anchor]


def outcome(form: Any, x: Inputs, memory: Memory, chunk: int, real: Any, clip: Any) -> tuple[list[Any], list[Any]]:
    """What a form returns at real tokens, and the gradient of a fixed mixture of it in everything that it is given."""
    leaves = [part.detach().clone().requires_grad_() for part in (*(p for p in x if p is not None), *tensors(memory))]
    own = iter(leaves)
    x = Inputs(*(None if part is None else next(own) for part in x))
    weights, momentum, anchor = ([next(own) for _ in part] for part in memory[:3])
    at_start = (memory.position == 0)[:, None, None]  # there the anchor is the memory itself
    anchor = [torch.where(at_start, w, old) for w, old in zip(weights, anchor, strict=True)]
    y, after = form(x, Memory(weights, momentum, anchor, memory.position), chunk, real, clip)
    y = y if real is None else y * real[..., None]
    rng = torch.Generator().manual_seed(1)
    found = [y, *tensors(after)]
    total = sum((t * torch.randn(t.shape, generator=rng, dtype=t.dtype)).sum() for t in found)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*found, after.position], list(grads)


def scalar(form: Any, chunk: int, time: int = 3) -> tuple[torch.Tensor, Memory]:
    one = torch.ones(1, time, 1, dtype=torch.float64)
    gate = one[..., 0]
    return form(Inputs(one, one, one, 0.25 * gate, 0.1 * gate, 0.5 * gate), fresh([one[:, :1] * 0]), chunk)


@FORMS
@pytest.mark.parametrize(
    ("chunk", "expected", "momentum"), [(1, [0.5, 0.95, 1.13], 0.275), (3, [0.5, 1.2, 1.955], 0.875)]
)
def test_the_worked_example(form, chunk, expected, momentum):
    y, memory = scalar(form, chunk)
    assert y.flatten().tolist() == pytest.approx(expected, abs=1e-14)
    assert memory.momentum[0].item() == pytest.approx(momentum, abs=1e-14)


def test_the_online_rule_settles_below_the_value_and_stale_gradients_diverge():
    for chunk in (1, 2):
        assert scalar(chunk_memory, chunk, 400)[1].weights[0].item() == pytest.approx(10 / 11, abs=1e-9)
    assert scalar(chunk_memory, 4, 400)[1].weights[0].item() == pytest.approx(-1.9e21, rel=0.05)
    assert scalar(chunk_memory, 8, 400)[1].weights[0].item() == pytest.approx(-1.5e33, rel=0.05)


def test_a_memory_that_is_zero_has_a_gradient_under_a_clip():
    x, memory = drawn(1, 3, [2, 3, 2])
    x = x._replace(forget=torch.ones_like(x.forget), step=torch.zeros_like(x.step), momentum=None)
    memory = memory._replace(momentum=[])
    naive, fast = (outcome(form, x, memory, 1, None, 0.5) for form in (naive_memory, chunk_memory))
    for one, other in zip(naive[0] + naive[1], fast[0] + fast[1], strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_chunks_equal_tokens_forward_and_gradient(data):
    """Any depth, chunk, length; gates at their bounds; clipped; from within a chunk; rows of different lengths."""
    draw = data.draw
    rows, time, chunk = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 11))
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    x, memory = drawn(rows, time, sizes, draw(st.integers(0, 99)))
    for gate in (x.forget, x.momentum, x.step):
        for bound in (0.0, 1.0 if gate is not x.step else 0.0):
            gate[:, draw(st.integers(0, time - 1))] = bound
    momentum, forget = draw(st.booleans()), draw(st.booleans())
    x = x._replace(momentum=x.momentum if momentum else None, forget=x.forget if forget else None)
    position = torch.tensor([draw(st.integers(0, chunk - 1)) for _ in range(rows)])
    anchor = [w + 0.1 * (position > 0)[:, None, None] for w in memory.weights]
    memory = memory._replace(position=position, anchor=anchor, momentum=memory.momentum if momentum else [])
    real = None
    if draw(st.booleans()):
        real = torch.arange(time) < torch.tensor([[draw(st.integers(0, time))] for _ in range(rows)])
    clip = draw(st.sampled_from([None, 0.5, 2.0, 1e6]))
    (naive, naive_grads), (fast, fast_grads) = (
        outcome(form, x, memory, chunk, real, clip) for form in (naive_memory, chunk_memory)
    )
    for one, other in zip(naive + naive_grads, fast + fast_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13])
def test_one_layer_is_the_linear_form_of_the_specification(chunk):
    x, memory = drawn(2, 13, [3, 4])
    y, after = chunk_memory(x, memory, chunk)
    w, s, out = memory.weights[0], memory.momentum[0], []
    for i in range(0, 13, chunk):
        q, k, v, theta, alpha, eta = (part[:, i : i + chunk] for part in x)
        a, e = products(1 - alpha), products(eta)
        kept, gone = (1 - alpha).cumprod(-1)[..., None], eta.cumprod(-1)[..., None]
        g, f, wrong = (a @ e) * theta[:, None], a @ gone, k @ w - v
        out.append(kept * (q @ w) + f * (q @ s) - 2 * ((q @ k.mT) * g) @ wrong)
        w, s = (
            kept[:, -1:] * w + f[:, -1:] * s - 2 * k.mT @ (g[:, -1, :, None] * wrong),
            gone[:, -1:] * s - 2 * k.mT @ ((theta * e[:, -1])[..., None] * wrong),
        )
    torch.testing.assert_close(y, torch.cat(out, 1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.weights[0], w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.momentum[0], s, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_right_by_finite_differences():
    x, memory = drawn(1, 5, [2, 3, 2])
    given_ = [part.requires_grad_() for part in (*x, *memory.weights, *memory.momentum)]

    def run(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, momentum = list(parts[6:8]), list(parts[8:])
        y, after = chunk_memory(Inputs(*parts[:6]), Memory(weights, momentum, weights, memory.position), 2)
        return y, *after.weights, *after.momentum, *after.anchor

    assert torch.autograd.gradcheck(run, given_)


@FORMS
def test_a_half_step_without_momentum_writes_the_value_exactly(form):
    x, memory = drawn(2, 6, [4, 3], alpha=0)
    x = x._replace(step=torch.full_like(x.step, 0.5), momentum=None, forget=None)
    memory = memory._replace(momentum=[])
    for t in range(6):
        y, memory = form(
            Inputs(*(None if p is None else p[:, t : t + 1] for p in x))._replace(q=x.k[:, t : t + 1]), memory, 1
        )
        torch.testing.assert_close(y, x.v[:, t : t + 1], rtol=1e-12, atol=1e-12)


def test_one_chunk_from_zero_is_causal_linear_attention():
    x, _ = drawn(2, 9, [4, 3])
    x = x._replace(momentum=None, forget=None)
    y, _ = chunk_memory(x, fresh([torch.zeros(2, 4, 3, dtype=torch.float64)], momentum=False), 9)
    torch.testing.assert_close(y, (x.q @ x.k.mT).tril() @ (2 * x.step[..., None] * x.v))


def test_forgetting_everything_leaves_the_momentum():
    x, memory = drawn(1, 6, [3, 4, 3])
    x.forget[:, 4] = 1
    _, at = chunk_memory(Inputs(*(part[:, :5] for part in x)), memory, 3)
    for w, s in zip(at.weights, at.momentum, strict=True):
        torch.testing.assert_close(w, s, rtol=1e-12, atol=1e-12)


def test_without_steps_and_momentum_the_memory_only_decays():
    x, memory = drawn(2, 7, [3, 4, 3])
    x = x._replace(step=torch.zeros_like(x.step))
    start = fresh(memory.weights)
    _, after = chunk_memory(x, start, 4)
    for w, old in zip(after.weights, memory.weights, strict=True):
        torch.testing.assert_close(w, (1 - x.forget).prod(1)[:, None, None] * old)


def test_products_are_exact_where_a_factor_is_zero():
    x = torch.tensor([0.5, 0.0, 0.5, 0.25])
    expected = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 1, 0], [0, 0.125, 0.25, 1]])
    assert torch.equal(products(x), expected)
    assert torch.isfinite(products(torch.zeros(70))).all()
    assert products(torch.full((70,), 0.1))[-1, 0] == 0  # no denormal numbers


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.9, 1.0]), min_size=1, max_size=6))
def test_products_have_their_gradient_even_where_factors_are_zero(factors):
    x = torch.tensor([factors, factors[::-1]], dtype=torch.float64, requires_grad=True)
    time = range(len(factors))
    rows = [
        torch.stack([x[:, s + 1 : t + 1].prod(1) if s <= t else torch.zeros_like(x[:, 0]) for s in time], 1)
        for t in time
    ]
    expected, found = torch.stack(rows, 1), products(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((y * weights).sum(), x, allow_unused=True)[0] for y in (found, expected))
    torch.testing.assert_close(*(torch.zeros_like(x) if grad is None else grad for grad in gradients))


def test_a_token_that_is_not_real_leaves_no_trace_in_the_state():
    x, memory = drawn(2, 9, [3, 4, 3])
    real = torch.arange(9) < torch.tensor([[4], [9]])
    _, padded = chunk_memory(x, memory, 4, real)
    _, short = chunk_memory(
        Inputs(*(part[:1, :4] for part in x)),
        Memory(*([w[:1] for w in part] for part in memory[:3]), memory.position[:1]),
        4,
    )
    assert all(torch.equal(one[:1], other) for one, other in zip(tensors(padded), tensors(short), strict=True))
    assert padded.position.tolist() == [0, 1]


def test_surprise_is_the_norm_of_the_gradient():
    x, memory = drawn(2, 7, [3, 4, 3])
    found = surprises(x, memory, 3)
    weights = memory
    for start in range(0, 7, 3):
        part = Inputs(*(p[:, start : start + 3] for p in x))
        for t in range(part.k.shape[1]):
            leaves = [w.clone().requires_grad_() for w in weights.weights]
            loss = (recall(leaves, part.k[:, t : t + 1]) - part.v[:, t : t + 1]).square().sum()
            norm = sum(g.square().sum((1, 2)) for g in torch.autograd.grad(loss, leaves)).sqrt()
            torch.testing.assert_close(found[:, start + t], norm)
        _, weights = naive_memory(part, weights, 3)


def test_mixed_precision_does_not_reach_the_memory():
    x, memory = drawn(2, 7, [3, 4, 3])
    x = Inputs(*(part.float().requires_grad_() for part in x))
    memory = memory._replace(**{n: [w.float() for w in getattr(memory, n)] for n in ("weights", "momentum", "anchor")})

    plain, after = chunk_memory(x, memory, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, after_mixed = chunk_memory(x, memory, 3)
    assert torch.equal(plain, mixed)
    assert all(torch.equal(one, other) for one, other in zip(tensors(after), tensors(after_mixed), strict=True))
    grads = [torch.autograd.grad(y.sum(), list(x)) for y in (plain, mixed)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_bad_input_is_named():
    x, memory = drawn(2, 5, [3, 4, 3])
    with pytest.raises(PalimpsestError, match="chunk is 0, expected at least 1"):
        chunk_memory(x, memory, 0)
    for name, wrong in (("forget", 1.5), ("momentum", -0.1), ("step", -0.5), ("forget", float("nan"))):
        gate = getattr(x, name).clone()
        gate[0, 2] = wrong
        with pytest.raises(PalimpsestError, match=f"the gate {name} is"):
            chunk_memory(x._replace(**{name: gate}), memory, 2)
    with pytest.raises(PalimpsestError, match=r"clip is 0\.0, expected above 0"):
        chunk_memory(x, memory, 2, None, 0.0)
    with pytest.raises(PalimpsestError, match="output has width 3, but the values have 2"):
        chunk_memory(x._replace(v=x.v[..., :2]), memory, 2)
    with pytest.raises(PalimpsestError, match="layer 0 of the memory takes width 3, but is given 2"):
        chunk_memory(x._replace(k=x.k[..., :2]), memory, 2)
    with pytest.raises(PalimpsestError, match="has 2 rows, but the tokens have 1"):
        chunk_memory(Inputs(*(part[:1] for part in x)), memory, 2)
    with pytest.raises(PalimpsestError, match="no tokens"):
        chunk_memory(Inputs(*(part[:, :0] for part in x)), memory, 2)
    with pytest.raises(PalimpsestError, match="needs momentum gates"):
        chunk_memory(x._replace(momentum=None), memory, 2)


def test_a_memory_that_is_no_longer_finite_names_the_chunk():
    ones = torch.ones(1, 400, 1)
    gate = ones[..., 0]
    with pytest.raises(PalimpsestError, match=r"not finite after chunk \d\d \(of 50, 8 tokens each\).*lower theta_max"):
        chunk_memory(Inputs(ones, ones, ones, gate, 0 * gate, 0.5 * gate), fresh([torch.zeros(1, 1, 1)]), 8)
    x, memory = drawn(1, 12, [2, 3, 2])
    x.v[:, 9] = float("inf")
    with pytest.raises(PalimpsestError, match=r"after chunk 3 \(of 4"):
        chunk_memory(x, memory, 3)


def test_a_clipped_memory_cannot_run_away():
    ones = torch.ones(1, 4000, 1)
    gate = ones[..., 0]
    x, start = Inputs(ones, ones, ones, gate, 0 * gate, 0.5 * gate), fresh([0 * ones[:, :1]])
    _, after = chunk_memory(x, start, 8, None, 1.0)
    assert after.weights[0].abs() <= 2 * 4000  # theta clip / (1 - eta) a token


def test_a_stream_of_pairs_is_written_and_recalled():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((8, 16))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values = rng.standard_normal((8, 5))
    memory = StreamMemory([torch.zeros(16, 5, dtype=torch.float64)], step=0.5)
    memory.write(keys, values)
    first = memory.surprise
    assert torch.allclose(memory.read(keys[-1:]), torch.as_tensor(values[-1:]))
    for _ in range(20):
        memory.write(keys, values)
    assert memory.error(keys, values) < 1e-3
    assert (memory.surprise < first / 10).all()
