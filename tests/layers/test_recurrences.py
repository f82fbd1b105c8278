"""Update rules of matrix memories: chunks give what single tokens give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.layers.recurrences import Inputs, chunk_recurrence, naive_recurrence

RULES = ("linear", "gated-linear", "delta", "gated-delta")


def inputs(rule: str, time: int = 13, seed: int = 0, n: int = 2, h: int = 2, d: int = 3, e: int = 4) -> Inputs:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(n, h, time, w, dtype=torch.float64) for w in (d, d, e))
    beta = torch.rand(n, h, time, dtype=torch.float64) if "delta" in rule else None
    decay = -2 * torch.rand(n, h, time, dtype=torch.float64) if "gated" in rule else None
    return Inputs(q, F.normalize(k, dim=-1), v, beta, decay)


def memory(x: Inputs, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(*x.q.shape[:2], x.q.shape[-1], x.v.shape[-1], dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RULES), st.integers(1, 20), st.integers(1, 25), st.integers(0, 1000))
def test_chunks_of_any_size_give_what_the_loop_gives(rule, time, chunk, seed):
    x = inputs(rule, time, seed)
    expected, end = naive_recurrence(x, memory(x))
    found, after = chunk_recurrence(x, memory(x), chunk)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(after, end, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_the_gradients_are_those_of_the_loop(rule):
    def gradients(form):
        x = Inputs(*(None if t is None else t.requires_grad_() for t in inputs(rule)))
        start = memory(x).requires_grad_()
        out, end = form(x, start)
        (out.square().sum() + end.sum()).backward()
        return [t.grad for t in (*x, start) if t is not None]

    for fast, slow in zip(gradients(lambda x, m: chunk_recurrence(x, m, 4)), gradients(naive_recurrence), strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


def test_linear_attention_is_a_masked_product():
    x = inputs("linear")
    out, _ = chunk_recurrence(x, torch.zeros_like(memory(x)), 4)
    torch.testing.assert_close(out, (x.q @ x.k.mT).tril() @ x.v, rtol=0, atol=1e-12)


def test_the_delta_rule_with_full_strength_stores_what_it_was_told():
    x = inputs("delta")._replace(beta=torch.ones(2, 2, 13, dtype=torch.float64))
    _, end = chunk_recurrence(x, memory(x), 5)
    torch.testing.assert_close(x.k[:, :, -1:] @ end, x.v[:, :, -1:], rtol=0, atol=1e-12)


def test_gates_that_do_nothing_change_nothing():
    x = inputs("delta")
    gated = x._replace(log_decay=torch.zeros_like(x.beta))
    assert torch.equal(chunk_recurrence(gated, memory(x))[0], chunk_recurrence(x, memory(x))[0])


def test_a_token_that_forgets_everything_leaves_only_itself():
    x = inputs("gated-linear")
    x.log_decay[:, :, 6] = -1e4
    _, end = chunk_recurrence(x, memory(x), 4)
    rest = Inputs(*(None if t is None else t[:, :, 6:] for t in x))
    _, expected = naive_recurrence(rest, torch.zeros_like(end))
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-12)


def test_half_precision_inputs_keep_a_single_precision_memory():
    x = Inputs(*(None if t is None else t.bfloat16() for t in inputs("gated-delta")))
    out, end = chunk_recurrence(x, memory(x).float(), 4)
    assert (out.dtype, end.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_mixed_precision_does_not_reach_the_memory(rule):
    x = Inputs(*(None if t is None else t.float() for t in inputs(rule)))
    start = memory(x).float()
    expected, end = naive_recurrence(x, start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, mixed_end = chunk_recurrence(x, start, 4)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed_end, end, rtol=0, atol=1e-5)
