from __future__ import annotations

import pytest
import torch

from memorised import people, quiet
from one_by_one import roughened, slow_gradients, some_records
from palimpsest.errors import PalimpsestError
from palimpsest.statistics import projection
from palimpsest.statistics.gradients import Dense, Gradient, Outer, Routed, Rows
from palimpsest.statistics.projection import DenseProjection, KroneckerProjection, projected_gradients

BOTH = (DenseProjection(64), KroneckerProjection(8, 8))


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(name="w", positions=3):
    return Gradient(name, torch.Size((6, 5)), 2, [Outer(draw(1, 2, 1, positions, 6), draw(2, 2, 1, positions, 5))])


def bias(name="b"):
    return Gradient(name, torch.Size((30,)), 2, [Dense(draw(9, 2, 30))])


def grouped():
    return Gradient("w", torch.Size((8, 5)), 2, [Outer(draw(1, 2, 2, 3, 4), draw(2, 2, 2, 3, 5))])


def tied():
    tokens = torch.tensor([[0, 3, 3], [5, 1, 0]])
    pieces = [Rows(tokens, draw(1, 2, 3, 5)), Outer(draw(1, 2, 1, 3, 6), draw(2, 2, 1, 3, 5))]
    return Gradient("w", torch.Size((6, 5)), 2, pieces)


def experts():
    example, block = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 0, 0, 2, 2])
    return Gradient("w", torch.Size((3, 4, 5)), 2, [Routed(draw(1, 5, 4), draw(2, 5, 5), example, block)])


@pytest.mark.parametrize(("gradient", "blocks"), [(linear(), 1), (grouped(), 2), (tied(), 1), (experts(), 3)])
def test_the_factors_are_projected_as_the_whole_gradient_would_be(gradient, blocks):
    made = KroneckerProjection(left=3, right=4, seed=5)
    dense = gradient.dense().view(2, blocks, -1, 5)
    left, right = made.signs("w", blocks, dense.shape[2], 5)
    expected = torch.einsum("ekrc,krx,cy->exy", dense, left.double(), right.double()).flatten(1) / 12**0.5
    torch.testing.assert_close(made(gradient), expected)


def test_the_dense_map_is_a_matrix_of_signs(monkeypatch):
    monkeypatch.setattr(projection, "BAND", 7 * 4)  # bands of 7 of the 30 numbers
    made = DenseProjection(4, seed=3)
    heights = [7, 7, 7, 7, 2]
    matrix = torch.cat([made.signs("w", band, height) for band, height in enumerate(heights)]).double()
    assert set(matrix.unique().tolist()) == {-1, 1}
    torch.testing.assert_close(made(linear()), linear().dense().flatten(1) @ matrix / 2)


@pytest.mark.parametrize("make", [lambda seed: DenseProjection(16, seed), lambda seed: KroneckerProjection(4, 4, seed)])
@pytest.mark.parametrize("gradient", [linear(), bias(), experts()])
def test_inner_products_are_right_on_average(make, gradient):
    flat = gradient.dense().flatten(1)
    found = torch.stack([(p := make(seed)(gradient)) @ p.T for seed in range(1200)])
    error = found.std(0) / 1200**0.5
    assert ((found.mean(0) - flat @ flat.T).abs() < 4.5 * error + 1e-9).all()


def test_the_deviations_are_those_that_are_stated():
    gradient = linear(positions=1)
    norms = gradient.squared_norms()[0]
    for make, stated in ((lambda s: DenseProjection(64, s), 2 / 64), (lambda s: KroneckerProjection(8, 8, s), 4 / 8)):
        found = torch.stack([make(seed)(gradient)[0].square().sum() for seed in range(1000)]) / norms
        assert 0.3 * stated < float(found.var()) < 1.3 * stated  # short vectors of signs vary a little less


@pytest.mark.parametrize("kind", [DenseProjection, KroneckerProjection])
def test_a_seed_and_a_name_have_their_own_signs(kind):
    first = kind(seed=1)(linear())
    assert torch.equal(first, kind(seed=1)(linear()))
    assert not torch.equal(first, kind(seed=2)(linear()))
    assert not torch.equal(first, kind(seed=1)(linear("other")))


def test_signs_that_are_not_kept_are_the_same_when_made_again(monkeypatch):
    kept = DenseProjection(8)(linear())
    monkeypatch.setattr(projection, "KEPT", 0)
    made = DenseProjection(8)
    assert torch.equal(made(linear()), kept)
    assert torch.equal(made(linear()), kept)


@pytest.mark.parametrize("name", ["llama", "moe", "convnet"])
@pytest.mark.parametrize("made", BOTH, ids=["dense", "kronecker"])
def test_projected_gradients_do_not_depend_on_the_batches(name, made):
    model, records = roughened(name), some_records(name)
    one = projected_gradients(model, records, quiet(), made, batch_size=1)
    many = projected_gradients(model, records[::-1], quiet(), made, batch_size=5).flip(0)
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def test_which_gradients_are_alike_survives():
    model, records = roughened("gpt2"), people()[:6]
    exact = sum(g.flatten(1) @ g.flatten(1).T for g in slow_gradients(model, records).values())
    found = projected_gradients(model, records, quiet(), DenseProjection(2048))
    size = exact.diagonal().sqrt()
    cosine, expected = ((m / size[:, None] / size[None, :]) for m in (found @ found.T, exact))
    assert float((cosine - expected).abs().max()) < 0.1
    assert float(expected.abs().min()) < 0.7  # there is something to tell apart


def test_a_projection_to_nothing_is_refused():
    with pytest.raises(PalimpsestError, match="right is 0, expected at least 1"):
        KroneckerProjection(left=1, right=0)
    with pytest.raises(PalimpsestError, match="size is 0, expected at least 1"):
        DenseProjection(0)
