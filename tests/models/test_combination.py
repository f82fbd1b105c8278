from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import (
    Difference,
    Interpolate,
    contrast,
    difference,
    hold_down,
    interpolate,
    kept,
)

TARGET, ASSISTANT = torch.tensor([3.0, 2.0, 0.0, -4.0]), torch.tensor([2.0, -1.0, 1.0, 5.0])
RATES = (0.0, 0.01, 0.3, 0.9)
logits_of = partial(st.lists, st.floats(-8, 8), min_size=6, max_size=6)


def test_the_difference_matches_the_official_numbers():
    official = partial(difference, TARGET, ASSISTANT, 0.75, centre=False)
    assert official().tolist() == pytest.approx([1.5, 2.75, -0.75, -7.75])
    assert official(rate=0.1).tolist() == pytest.approx([1.5, 2.75, 0.0, -4.0])
    assert official(rate=0.1, decoding=True).tolist() == pytest.approx([1.5, 2.75, -math.inf, -math.inf])


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("level", [0.0, 3.0, -40.0])
def test_an_assistant_that_knows_nothing_changes_nothing(rate, level):
    target = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    combined = difference(target, torch.full((5, 50), level), 0.75, rate)
    assert_close(combined.softmax(-1), target.softmax(-1), atol=1e-6, rtol=0)


@given(logits_of(), logits_of(), st.floats(-20, 20), st.sampled_from(RATES))
@settings(deadline=None, max_examples=50)
def test_a_constant_added_to_the_assistant_changes_nothing(target, assistant, level, rate):
    target, assistant = torch.tensor(target).double(), torch.tensor(assistant).double()
    assert_close(difference(target, assistant + level, 0.75, rate), difference(target, assistant, 0.75, rate))


def test_without_centring_a_constant_moves_the_dropped_tokens_against_the_kept():
    one, other = (difference(TARGET, ASSISTANT + level, 0.75, 0.1, centre=False).softmax(-1) for level in (0.0, 4.0))
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_target_as_its_own_assistant_is_a_temperature():
    assert_close(difference(TARGET, TARGET, 0.75).softmax(-1), (TARGET / 4).softmax(-1))
    assert_close(difference(TARGET, TARGET, 1.0).softmax(-1), torch.full((4,), 0.25))


@given(logits_of(), st.sampled_from(RATES[1:]), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_the_filter_keeps_what_is_likely_enough_and_never_too_little(logits, rate, least):
    logits = torch.tensor(logits)
    keep, p = kept(logits, rate, least), logits.softmax(-1)
    assert int(keep.sum()) >= least
    assert bool(keep[logits.argmax()])
    likely = p > rate * p.max() * 1.0001
    assert bool(keep[likely].all())
    if int(keep.sum()) > least:
        threshold = min(float(logits.sort(descending=True).values[least - 1]), float(logits.max()) + math.log(rate))
        assert bool((logits[keep] >= threshold).all())


def test_the_filter_is_no_silent_no_op_in_a_tiny_vocabulary():
    assert difference(TARGET, ASSISTANT, 0.75, 0.01, decoding=True).isinf().tolist() == [False, False, False, True]


def test_greedy_decoding_takes_a_kept_token_even_where_all_of_them_are_negative():
    target, assistant = torch.tensor([-1.0, -1.1, -9.0]), torch.tensor([9.0, 8.0, -9.0])
    assert int(difference(target, assistant, 2.0, 0.1, centre=False, decoding=True).argmax()) == 1


def test_probabilities_are_interpolated():
    base, other = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.734612, 0.265388, 0.0]).log()
    mixed = interpolate(base, other, 0.25).exp()
    assert float(mixed[0]) == pytest.approx(0.558653)
    assert float(interpolate(base.double(), other.double(), 0.25).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert_close(interpolate(base, other, 0.0).exp(), base.exp())
    assert_close(interpolate(base, other, 1.0).exp(), other.exp())


def test_interpolating_survives_logits_far_apart():
    mixed = interpolate(torch.tensor([0.0, -2000.0]), torch.tensor([-2000.0, 0.0]), 0.25)
    assert mixed.exp().tolist() == pytest.approx([0.75, 0.25])


def test_hold_down_matches_the_worked_example():
    found = hold_down(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([3.0, 0.5, 0.0]), 1.0)
    assert found.tolist() == pytest.approx([1, 1, 0])


def test_contrast_matches_the_worked_example():
    expert, other = torch.tensor([2.0, 1.0, 0.0, -3.0]), torch.tensor([1.0, 1.5, 0.0, -6.0])
    half = contrast(expert, other, 0.5, 0.1, decoding=True).softmax(-1)
    assert half.tolist() == pytest.approx([0.796268, 0.138371, 0.065362, 0], abs=1e-6)
    whole = contrast(expert, other, 1.0, 0.1, decoding=True).softmax(-1)
    assert whole.tolist() == pytest.approx([0.883492, 0.072521, 0.043986, 0], abs=1e-6)
    assert contrast(expert, other, 5.0, 1.0, decoding=True).argmax() == expert.argmax()
    assert_close(contrast(expert, expert, 3.0), expert)
    assert_close(contrast(expert + 5, other - 2, 1.0, 0.1, decoding=True).softmax(-1), whole)


def test_settings_out_of_range_are_refused():
    for make, said in (
        (lambda: Difference(alpha=-0.1), "alpha is -0.1, expected at least 0"),
        (lambda: Difference(rate=1.0), "rate is 1.0, expected below 1"),
        (lambda: Interpolate(weight=1.5), "weight is 1.5, expected at most 1"),
    ):
        with pytest.raises(PalimpsestError, match=said):
            make()
