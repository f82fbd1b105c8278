from __future__ import annotations

import numpy as np
import pytest

from palimpsest.reproduce.judging import above, at_least, at_most, below, row, text


@pytest.mark.parametrize(
    ("found", "verdict"), [([3, 4], "holds"), ([3, 1], "inconclusive"), ([1, 0], "does not hold"), ([], "inconclusive")]
)
def test_all_seeds_decide_together(found, verdict):
    assert at_least("enough", np.array(found), 2.0).verdict == verdict
    assert at_most("not too much", -np.array(found), -2.0).verdict == verdict


def test_seeds_are_compared_with_their_own_bound():
    assert at_least("more", np.array([1.0, 5.0]), np.array([0.5, 4.0])).verdict == "holds"
    assert at_most("less", np.array([1.0, 5.0]), np.array([0.5, 6.0])).verdict == "inconclusive"
    assert at_least("more", np.array([1.0]), np.array([0.5, 4.0])).verdict == "inconclusive"


def test_numbers_are_readable():
    assert text(np.array([0.5, 0.7])) == "0.60 ± 0.14"
    assert text(np.array([0.0003])) == "3.0e-04"
    assert text(np.array([])) == "-"
    assert row("npo", {"P": np.array([0.25])}) == {"model": "npo", "P": "0.25"}
    assert at_most("less", np.array([1.0, 2.0]), 3.0).found == "1.50 ± 0.71 against 3.00 ± 0.00"


def test_equal_is_at_least_but_not_above():
    same = np.array([1.0, 2.0])
    assert [check("as much", same, same).verdict for check in (at_least, at_most)] == ["holds"] * 2
    assert [check("more", same, same).verdict for check in (above, below)] == ["does not hold"] * 2
