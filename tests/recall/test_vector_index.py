from __future__ import annotations

import numpy as np
import pytest

from palimpsest.recall import vector_index
from palimpsest.recall.memories import Sight
from palimpsest.recall.rounded import RoundedVectors
from palimpsest.recall.vector_index import COLUMNS, VectorIndex
from remembering import unit

ALL = Sight()


def columns(numbers, turn=None, **more):
    count = len(numbers)
    made = {name: np.zeros(count, kind) for name, kind in COLUMNS.items()}
    made |= {"number": np.array(numbers), "turn": np.zeros(count, int) if turn is None else np.array(turn)}
    made |= {"ended": np.full(count, np.inf), "expires": np.full(count, np.inf), "cell": np.full(count, -1)}
    return made | more


def filled(vectors, turn=None):
    index = VectorIndex(vectors.shape[1])
    for part in np.array_split(np.arange(len(vectors)), 7):  # grows several times
        if len(part):
            index.put(columns(part + 1, None if turn is None else np.array(turn)[part]), vectors[part])
    return index


def brute(vectors, turn, query, limit, without=()):
    exact = vectors.astype(np.float64) @ query.astype(np.float64)
    numbers = [i for i in range(len(vectors)) if i + 1 not in without]
    return sorted(numbers, key=lambda i: (-round(exact[i], 12), -turn[i], i))[:limit]


@pytest.mark.parametrize("width", [7, 64, 384])
def test_the_ranking_is_that_of_float64_cosines_with_ties_and_deletions(width):
    draw = np.random.default_rng(width)
    vectors = unit(500, width)
    copies = draw.choice(500, 120, replace=False)
    vectors[copies] = vectors[copies[0]]  # far apart in memory
    turn = draw.integers(0, 40, 500)
    index = filled(vectors, turn)
    gone = set(draw.choice(np.arange(1, 501), 200, replace=False).tolist())
    index.keep(np.array([n for n in range(1, 501) if n not in gone]))
    mask = index.visible(ALL, None)
    for query in (*unit(20, width, seed=9), vectors[copies[0]]):
        for limit in (1, 8, 50):
            found = [number - 1 for number, _ in index.nearest(query, limit, mask)]
            assert found == brute(vectors, turn, query, limit, gone)


def test_few_visible_rows_are_found_the_same_way():
    vectors, index = unit(400), filled(unit(400))
    mask = index["number"] % 50 == 0
    expected = brute(vectors, np.zeros(400), vectors[3], 5, {n for n in range(1, 401) if n % 50})
    assert [n - 1 for n, _ in index.nearest(vectors[3], 5, mask)] == expected


def test_nothing_visible_gives_nothing():
    index = filled(unit(10))
    assert index.nearest(unit(1)[0], 3, np.zeros(10, bool)) == []
    assert VectorIndex(4).nearest(np.ones(4, np.float32), 3, np.zeros(0, bool)) == []


def test_a_chunk_that_is_put_again_is_replaced():
    vectors, index = unit(9), filled(unit(9))
    index.put(columns([4, 10], turn=[7, 8]), np.stack([vectors[0], vectors[1]]))
    assert index.size == 10
    assert index["number"].tolist() == list(range(1, 11))
    assert index["turn"].tolist() == [0, 0, 0, 7, 0, 0, 0, 0, 0, 8]
    np.testing.assert_array_equal(index.vectors[3], vectors[0])
    np.testing.assert_array_equal(index.vectors[9], vectors[1])


def test_what_is_visible():
    index = VectorIndex(2)
    made = columns(
        range(1, 7),
        scope=np.array([1, 1, 1, 1, 1, 2]),
        faded=np.array([0, 1, 0, 0, 0, 0], bool),
        ended=np.array([np.inf, np.inf, 50.0, np.inf, np.inf, np.inf]),
        expires=np.array([np.inf, np.inf, np.inf, 100.0, np.inf, np.inf]),
        happened=np.array([10.0, 10.0, 10.0, 10.0, 60.0, 10.0]),
    )
    index.put(made, unit(6, 2))

    def seen(scopes=None, **sight):
        return index["number"][index.visible(Sight(**sight), scopes)].tolist()

    assert seen(now=90.0) == [1, 4, 5, 6]
    assert seen(now=100.0) == [1, 5, 6]
    assert seen(np.array([2]), now=100.0) == [6]
    assert seen(np.array([], int), now=100.0) == []
    assert seen(view="all") == [1, 2, 3, 4, 5, 6]
    assert seen(as_of=40.0) == [1, 3, 4, 6]
    assert seen(as_of=60.0) == [1, 4, 5, 6]
    assert seen(view="all", without=frozenset({1, 6})) == [2, 3, 4, 5]


def test_cells_find_the_same_as_exact_search_where_vectors_have_clusters():
    draw = np.random.default_rng(0)
    centres = unit(40, 32, seed=1)
    vectors = centres[draw.integers(0, 40, 6000)] + 0.1 * unit(6000, 32, seed=2)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    index = filled(vectors)
    exact = [index.nearest(query, 10, index.visible(ALL, None)) for query in vectors[:30]]
    index.centres = index.find_centres()
    assert len(index.centres) == 6000 // 39  # as many as 39 vectors each allow; else 4 sqrt(N)
    index.put(columns(range(1, 6001), cell=index.cell_of(vectors)), vectors)
    mask = index.visible(ALL, None)
    assert [index.nearest(query, 10, mask) for query in vectors[:30]] == exact
    scored = index._candidates(vectors[0], mask)
    assert 0 < len(scored) < 3000


def test_what_has_no_cell_yet_is_always_looked_at():
    vectors = unit(4000, 16)
    index = filled(vectors)
    index.centres = index.find_centres()
    index.put(columns(range(1, 4001), cell=index.cell_of(vectors)), vectors)
    late = -vectors[:1]
    index.put(columns([4001]), late)
    assert index.nearest(late[0], 1, index.visible(ALL, None))[0][0] == 4001


@pytest.mark.parametrize("copies", [0, 700])
def test_a_first_look_at_rounded_vectors_misses_nothing(monkeypatch, copies):
    monkeypatch.setattr(vector_index, "ROUNDED_FROM", 100)
    draw = np.random.default_rng(2)
    vectors = unit(3000, 48)
    if copies:  # all within rounding of each other: no count but all of them is enough
        vectors[:copies] = vectors[0] + 1e-4 * unit(copies, 48, seed=3)
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    turn = draw.integers(0, 40, 3000)
    index = filled(vectors, turn)
    gone = set(draw.choice(np.arange(1, 3001), 1000, replace=False).tolist())
    for left in (set(), gone):
        index.keep(np.array([n for n in range(1, 3001) if n not in left]))
        mask = index.visible(ALL, None)
        for query in (*unit(10, 48, seed=9), vectors[0]):
            found = [number - 1 for number, _ in index.nearest(query, 8, mask)]
            assert found == brute(vectors, turn, query, 8, left)
    half = index["number"] % 2 == 0
    odd = {n for n in range(1, 3001) if n % 2}
    assert [n - 1 for n, _ in index.nearest(vectors[0], 8, half)] == brute(vectors, turn, vectors[0], 8, gone | odd)
    assert index._rounded.size == 2000


def test_the_error_of_rounding_is_never_above_what_is_said():
    vectors = unit(500, 32)
    rounded = RoundedVectors(32)
    rounded.follow(vectors[:200])
    rounded.follow(vectors * np.float32(1.0))  # later ones lie outside the range of the first
    everything = np.ones(500, bool)
    for query in unit(20, 32, seed=5):
        rows, bound = rounded.best(query, 50, everything)
        others = np.setdiff1d(np.arange(500), rows)
        assert (vectors[others] @ query).max() <= bound
        assert rounded.best(query, 500, everything)[1] <= bound
    assert 0 < rounded.delta < 0.5
