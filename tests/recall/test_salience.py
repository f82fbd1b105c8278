from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.recall.salience import least_salient, prune_count, recently_retrieved, salience

WORKED = {(0, True): 1.5, (50, False): 0.904837, (100, True): 1.318731, (500, False): 0.367879, (1000, True): 0.635335}


@pytest.mark.parametrize(("age", "used"), WORKED)
def test_salience_matches_the_worked_examples_in_both_readings(age, used):
    for mode, delta in (("intended", used), ("as-printed", not used)):
        found = salience(np.array([age]), np.array([delta]), 1.0, 0.002, 0.5, mode)
        assert found[0] == pytest.approx(WORKED[age, used], abs=5e-7)


def test_use_outweighs_age_up_to_346_turns():
    # an unused new memory against a used old one: lambda - beta = exp(-gamma a)
    delta = np.array([False, True])
    for age, used_wins in ((346, True), (347, False)):
        weights = salience(np.array([0, age]), delta, 1.0, 0.002, 0.5, "intended")
        assert bool(weights[1] > weights[0]) is used_wins


@pytest.mark.parametrize("mode", ["intended", "as-printed"])
def test_without_a_bonus_the_oldest_go_first(mode):
    turns = np.array([5, 3, 9, 1, 7])
    weights = salience(10 - turns, np.array([True, False, True, False, True]), 1.0, 0.002, 0.0, mode)
    order = least_salient(weights, turns, np.arange(5), np.zeros(5, bool), 5)
    assert turns[order].tolist() == [1, 3, 5, 7, 9]


def test_without_decay_there_are_two_values():
    weights = salience(np.arange(20), np.arange(20) % 3 == 0, 2.0, 0.0, 0.5, "intended")
    assert set(weights) == {2.0, 2.5}


@pytest.mark.parametrize(("last", "expected"), [(-1, False), (99, False), (100, True), (200, True), (201, False)])
def test_lately_is_within_the_window_edges_included(last, expected):
    assert recently_retrieved(200, np.array([last]), window=100)[0] == expected


def test_pruning_follows_the_closed_form_of_a_growing_store():
    kept, carry = 0, 0.0
    for round_ in range(1, 101):
        kept += 100
        count, carry = prune_count(kept, 0.005, carry)
        kept -= count
        assert kept == pytest.approx(19900 * (1 - 0.995**round_), abs=1)
        if round_ == 10:
            assert kept == 973  # 2.7 % of 1000 are gone
    assert 0 <= carry < 1


def test_a_small_store_forgets_too_but_not_too_fast():
    carry, gone = 0.0, 0
    for _ in range(40):
        count, carry = prune_count(50, 0.005, carry)  # a quarter of a memory each time
        gone += count
    assert gone == 10


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.floats(0, 1))
def test_pruning_never_takes_more_than_there_is_and_loses_nothing(sizes, fraction):
    carry = total = due = 0.0
    for size in sizes:
        count, carry = prune_count(size, fraction, carry)
        assert 0 <= count <= size
        total, due = total + count, due + fraction * size
    assert total + carry == pytest.approx(due, abs=1e-6 * max(1, due))


def test_of_equal_ones_the_oldest_go_first_and_pinned_ones_never():
    turns, numbers = np.array([4, 2, 2, 8]), np.array([10, 12, 11, 13])
    chosen = least_salient(np.ones(4), turns, numbers, np.array([False, True, False, False]), 3)
    assert numbers[chosen].tolist() == [11, 10, 13]
    assert least_salient(np.ones(2), turns[:2], numbers[:2], np.array([True, True]), 2).tolist() == []
