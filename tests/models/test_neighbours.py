from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import interpolate
from palimpsest.models.neighbours import Neighbours, closeness, distribution, index_bytes, index_of

KEYS = np.array([[0, 0], [1, 0], [0, 2]], dtype=np.float16)
VALUES = np.array([7, 3, 7], dtype=np.int32)
ORIGIN = torch.zeros(1, 2)


def drawn(rows: int, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)).astype(np.float16), rng.integers(0, 9, rows).astype(np.int32)


def p_of(store: Neighbours, queries: torch.Tensor, k: int, temperature: float, vocabulary: int = 9, exclude=None):
    near, rows = store.search(queries, k, exclude)
    return distribution(closeness(near, temperature), store.values[rows], vocabulary)


# --- the worked example ----------------------------------------------------------------------------------------------


def test_the_distribution_of_the_worked_example():
    p = p_of(Neighbours(KEYS, VALUES), ORIGIN, 3, 1.0)[0]
    assert p[7].item() == pytest.approx(0.734612, abs=1e-6)
    assert p[3].item() == pytest.approx(0.265388, abs=1e-6)


def test_keys_in_float32_stay_as_they_are_and_give_the_same_distances():
    keys = torch.from_numpy(KEYS).float()
    store = Neighbours(keys, torch.from_numpy(VALUES))
    for _ in range(2):
        assert store.search(ORIGIN, 3)[0].tolist() == [[0.0, 1.0, 4.0]]
    assert keys.tolist() == KEYS.tolist()


def test_the_mixture_of_the_worked_example():
    p = p_of(Neighbours(KEYS, VALUES), ORIGIN, 3, 1.0)
    base = torch.full((1, 9), 0.5 / 8)
    base[0, 7] = 0.5
    assert interpolate(base.log(), p.log(), 0.25)[0, 7].exp().item() == pytest.approx(0.558653, abs=1e-6)


def test_the_row_itself_left_out_of_the_worked_example():
    p = p_of(Neighbours(KEYS, VALUES), ORIGIN, 2, 1.0, exclude=torch.tensor([0]))[0]
    assert p[3].item() == pytest.approx(0.952574, abs=1e-6)
    assert p[7].item() == pytest.approx(0.047426, abs=1e-6)


def test_the_mixture_sums_to_one_in_double_precision():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(20, 300, generator=generator).double() * 5 for _ in range(2))
    for weight in (0.0, 0.3, 1.0):
        assert_close(interpolate(first, second, weight).exp().sum(-1), torch.ones(20).double(), rtol=0, atol=1e-12)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_all_rows_at_a_high_temperature_are_the_unigram_distribution():
    keys, values = drawn(50)
    p = p_of(Neighbours(keys, values), torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), 50, 1e12)
    expected = torch.from_numpy(np.bincount(values, minlength=9) / 50).float()
    assert_close(p, expected.expand(4, -1))


def test_a_low_temperature_leaves_the_nearest_neighbour():
    keys, values = drawn(50)
    queries = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    store = Neighbours(keys, values)
    p = p_of(store, queries, 50, 1e-9)
    nearest = store.values[store.search(queries, 1)[1][:, 0]].long()
    assert_close(p, torch.nn.functional.one_hot(nearest, 9).float())


# --- search ----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 80), st.integers(1, 12), st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_the_exact_index_ranks_as_brute_force(rows, width, seed):
    keys, values = drawn(rows, width, seed)
    queries = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    k = max(1, rows // 2)
    near, found = Neighbours(keys, values).search(queries, k)
    every = torch.cdist(queries.double(), torch.from_numpy(keys).double()) ** 2
    expected, order = every.sort(1)
    assert_close(near.double(), expected[:, :k], rtol=1e-4, atol=1e-5)
    apart = (expected.diff(dim=1) > 1e-4).all(1)
    assert torch.equal(found[apart], order[apart][:, :k])


def test_the_search_finds_what_an_exact_index_of_faiss_finds():
    import faiss

    keys, values = drawn(5000, 48)
    queries = torch.randn(300, 48, generator=torch.Generator().manual_seed(0))
    index = faiss.IndexFlatL2(48)
    index.add(keys.astype(np.float32))
    expected, rows = index.search(queries.numpy(), 30)
    near, found = Neighbours(keys, values).search(queries, 30)
    assert_close(near, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert (found.numpy() == rows).mean() > 0.999


def test_the_order_of_the_rows_does_not_matter():
    keys, values = drawn(300)
    order = np.random.default_rng(3).permutation(300)
    queries = torch.randn(10, 16, generator=torch.Generator().manual_seed(2))
    first, second = (
        p_of(Neighbours(k, v), queries, 40, 5.0) for k, v in ((keys, values), (keys[order], values[order]))
    )
    assert_close(first, second)


def test_what_is_found_does_not_depend_on_how_many_ask_together():
    keys, values = drawn(2000, 64)
    keys = keys + np.float16(30)  # far from the origin: products of long vectors round away small distances
    store = Neighbours(keys, values)
    queries = torch.from_numpy(keys[:200]).float() + 0.01
    together = store.search(queries, 8)
    alone = [store.search(q[None], 8) for q in queries]
    assert torch.equal(together[0], torch.cat([near for near, _ in alone]))
    assert torch.equal(together[1], torch.cat([rows for _, rows in alone]))
    assert torch.equal(together[1][:, 0], torch.arange(200))


def test_a_row_is_left_out_by_its_number_wherever_it_is_found():
    keys, values = drawn(40)
    keys[5] = keys[20] = keys[31]
    store = Neighbours(keys, values)
    queries = store.keys[[5, 20, 31]].float()
    near, found = store.search(queries, 10, torch.tensor([5, 20, 31]))
    assert found.shape == (3, 10)
    for row, own in zip(found.tolist(), (5, 20, 31), strict=True):
        assert own not in row
        assert set(row[:2]) == {5, 20, 31} - {own}
    assert bool((near[:, :2] == 0).all())
    assert bool((near[:, 2] > 0).all())


def test_an_approximate_index_is_used_above_the_limit_and_gives_exact_distances():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 32)) * 4
    keys = (centres[rng.integers(0, 40, 6000)] + rng.normal(size=(6000, 32))).astype(np.float16)
    values = rng.integers(0, 9, 6000).astype(np.int32)
    exact, store = Neighbours(keys, values), Neighbours(keys, values, exact_up_to=5000)
    assert exact.index is None
    assert type(store.index).__name__ == "IndexIVFPQ"
    assert (store.index.pq.M, store.index.nlist) == (32, 6000 // 39)
    own = torch.arange(100)
    queries = store.keys[own].float()
    near, found = store.search(queries, 20, own)
    assert bool((found != own[:, None]).all())
    assert_close(near, (queries[:, None] - store.keys[found].float()).square().sum(-1))
    right = exact.search(queries, 20, own)[1]
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), right.tolist(), strict=True)])
    assert recall > 0.6
    rough = Neighbours(keys, values, exact_up_to=5000, exact_distances=False, index=store.index)
    assert not torch.allclose(rough.search(queries, 20, own)[0], near)


def test_missing_results_of_an_approximate_index_count_nothing():
    keys, values = drawn(3000, 8)
    store = Neighbours(keys, values, exact_up_to=10)
    store.index.nprobe = 1
    near, found = store.search(torch.from_numpy(keys[:50]).float(), 500)
    assert bool((found == -1).any())
    assert bool(torch.isinf(near[found == -1]).all())
    weights = closeness(near, 1.0)
    assert bool((weights[found == -1] == 0).all())
    assert_close(weights.sum(1), torch.ones(50))


def test_an_index_comes_back_from_its_bytes():
    keys, values = drawn(3000, 8)
    store = Neighbours(keys, values, exact_up_to=10)
    again = Neighbours(keys, values, index=index_of(index_bytes(store.index)))
    queries = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    for a, b in zip(store.search(queries, 5), again.search(queries, 5), strict=True):
        assert torch.equal(a, b)


def test_copies_share_the_rows():
    store = Neighbours(KEYS, VALUES)
    assert copy.deepcopy(store) is store


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    store = Neighbours(KEYS, VALUES)
    with pytest.raises(PalimpsestError, match="the datastore is empty"):
        Neighbours(KEYS[:0], VALUES[:0])
    with pytest.raises(PalimpsestError, match="the datastore has 3 keys and 2 values"):
        Neighbours(KEYS, VALUES[:2])
    with pytest.raises(PalimpsestError, match="the queries are 3 wide and the keys of the datastore 2"):
        store.search(torch.zeros(1, 3), 1)
    for k in (0, 4):
        with pytest.raises(PalimpsestError, match=f"k is {k}, expected 1 to 3"):
            store.search(ORIGIN, k)
    with pytest.raises(PalimpsestError, match="k is 3, expected 1 to 2"):
        store.search(ORIGIN, 3, torch.tensor([0]))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(PalimpsestError, match=r"temperature is .*, expected above 0"):
            closeness(torch.ones(1, 2), temperature)
    with pytest.raises(PalimpsestError, match="the datastore holds the token 7, expected 0 to 4"):
        p_of(store, ORIGIN, 3, 1.0, vocabulary=5)
