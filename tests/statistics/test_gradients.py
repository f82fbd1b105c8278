"""The algebra of factored gradients against the same gradients written out, for all shapes and combinations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.statistics import gradients
from palimpsest.statistics.gradients import Dense, Gradient, Outer, Routed, Rows

SIZES = st.integers(1, 5)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outer(n, blocks, positions, rows, columns, seed=0):
    return Outer(draw(seed, n, blocks, positions, rows), draw(seed + 1, n, blocks, positions, columns))


def embedded(n, positions, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Rows(torch.randint(0, rows, (n, positions), generator=generator), draw(seed, n, positions, columns))


def routed(n, slots, experts, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    example, block = (torch.randint(0, top, (slots,), generator=generator) for top in (n, experts))
    return Routed(draw(seed, slots, rows), draw(seed + 1, slots, columns), example, block)


def written_out(pieces, n, shape):
    """The gradients position by position, as the definition says."""
    total = torch.zeros(n, *shape, dtype=torch.float64)
    for piece in pieces:
        if isinstance(piece, Outer):
            blocks = total.view(n, piece.left.shape[1], piece.left.shape[3], -1)
            for e in range(n):
                for k in range(blocks.shape[1]):
                    for g, a in zip(piece.left[e, k], piece.right[e, k], strict=True):
                        blocks[e, k] += torch.outer(g, a)
        elif isinstance(piece, Rows):
            for e in range(n):
                for token, g in zip(piece.tokens[e], piece.right[e], strict=True):
                    total[e, token] += g
        elif isinstance(piece, Routed):
            for g, a, e, k in zip(piece.left, piece.right, piece.example, piece.block, strict=True):
                total[e, k] += torch.outer(g, a)
        else:
            total += piece.values
    return total


def check(pieces, n, shape):
    gradient, expected = Gradient("w", torch.Size(shape), n, pieces), written_out(pieces, n, shape)
    torch.testing.assert_close(gradient.dense(), expected)
    squares = torch.zeros(shape, dtype=torch.float64)
    gradient.add_squares(squares)
    torch.testing.assert_close(squares, expected.square().sum(0))
    torch.testing.assert_close(gradient.squared_norms(), expected.flatten(1).square().sum(1))


@settings(max_examples=40, deadline=None)
@given(
    n=SIZES, blocks=SIZES, positions=st.integers(1, 14), rows=SIZES, columns=SIZES, cache=st.sampled_from([1, 7, 1000])
)
def test_outer_products(n, blocks, positions, rows, columns, cache):
    before, gradients.CACHE = gradients.CACHE, cache
    try:
        check([outer(n, blocks, positions, rows, columns)], n, (blocks * rows, columns))
    finally:
        gradients.CACHE = before


@settings(max_examples=25, deadline=None)
@given(n=SIZES, positions=st.integers(1, 9), tokens=st.integers(1, 9), rows=SIZES, columns=SIZES)
def test_a_tied_embedding_is_the_sum_of_its_uses(n, positions, tokens, rows, columns):
    check([embedded(n, tokens, rows, columns)], n, (rows, columns))
    both = [embedded(n, tokens, rows, columns), outer(n, 1, positions, rows, columns)]
    check(both, n, (rows, columns))
    check([*both, outer(n, 1, 2, rows, columns, seed=5), embedded(n, 1, rows, columns, seed=6)], n, (rows, columns))


@settings(max_examples=25, deadline=None)
@given(n=SIZES, slots=st.integers(1, 12), experts=SIZES, rows=SIZES, columns=SIZES, cache=st.sampled_from([1, 1000]))
def test_routed_outer_products(n, slots, experts, rows, columns, cache):
    before, gradients.CACHE = gradients.CACHE, cache
    try:
        check([routed(n, slots, experts, rows, columns)], n, (experts, rows, columns))
    finally:
        gradients.CACHE = before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [1, 6, gradients.FEW + 1, 4 * gradients.FEW + 1])
def test_positions_without_a_gradient_add_nothing(positions, side, monkeypatch):
    monkeypatch.setattr(gradients, "CACHE", 1)  # the weight is large
    piece = outer(5, 2, positions, 4, 3)
    values = getattr(piece, side)
    values[0] = 0
    values[1, :, 1:] = 0
    values[2, 0] = 0  # in one block only
    values[3] = -values[3].abs()
    values[3, ..., 0] = 0
    check([piece], 5, (8, 3))


@pytest.mark.parametrize("cache", [1000, gradients.CACHE])
@pytest.mark.parametrize("positions", [1, 2, gradients.FEW, gradients.FEW + 1])
def test_squares_in_float32_are_those_of_float64_and_not_below_zero(positions, cache, monkeypatch):
    monkeypatch.setattr(gradients, "CACHE", cache)  # the weight is large, or small
    exact = outer(6, 2, positions, 40, 50)
    if positions > 1:  # the first two gradients of each example cancel, and nothing but rounding is left of them
        exact.left[:, :, 1], exact.right[:, :, 1] = -exact.left[:, :, 0], exact.right[:, :, 0]
    made = []
    for dtype in (torch.float64, torch.float32):
        piece, squares = Outer(exact.left.to(dtype), exact.right.to(dtype)), torch.zeros(80, 50, dtype=dtype)
        Gradient("w", torch.Size((80, 50)), 6, [piece]).add_squares(squares)
        assert squares.min() >= 0
        made.append(squares.double())
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-4)


def test_a_weight_with_uses_of_different_kinds():
    check([Dense(draw(1, 3, 4, 5)), outer(3, 1, 2, 4, 5)], 3, (4, 5))
    check([Dense(draw(1, 3, 4, 5)), embedded(3, 2, 4, 5), Dense(draw(2, 3, 4, 5))], 3, (4, 5))
    check([routed(3, 6, 2, 4, 5), Dense(draw(1, 3, 2, 4, 5))], 3, (2, 4, 5))


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_a_norm_is_the_same_whichever_way_is_cheaper(positions):
    """Few positions: without forming the gradient; many: by forming it."""
    check([outer(2, 1, positions, 6, 7)], 2, (6, 7))
