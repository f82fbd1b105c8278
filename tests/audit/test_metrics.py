"""The worked numbers of the measures, as pure functions."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

from palimpsest.audit.answer_probability import share
from palimpsest.audit.answers import Answer
from palimpsest.audit.extraction import extraction_strength
from palimpsest.audit.forget_quality import forget_quality
from palimpsest.audit.membership import auc, auc_value, min_k, min_k_plus, privleak, zlib_ratio
from palimpsest.audit.model_utility import harmonic_mean
from palimpsest.audit.reading import Reading, Value, bootstrap_value, mean_value
from palimpsest.audit.relearning import robustness
from palimpsest.audit.rouge_recall import rouge_l
from palimpsest.audit.text_health import repetition
from palimpsest.audit.truth_ratio import aggregate, truth_ratio
from palimpsest.errors import PalimpsestError
from palimpsest.statistics.likelihood import token_scores

RIGHT, WRONG = 1.0, [1.0, 2.0, 3.0, 2.0, 2.0]


def answer(*probabilities: float, end: int = 0) -> Answer:
    log_p = np.log(probabilities)
    return Answer(log_p, np.zeros_like(log_p), np.ones_like(log_p), np.ones(len(log_p), bool), end)


def test_probability_is_a_geometric_mean():
    assert answer(0.5, 0.25).mean_nll == pytest.approx(1.0397208, abs=1e-6)
    assert math.exp(-answer(0.5, 0.25).mean_nll) == pytest.approx(0.3535534, abs=1e-6)


def test_multiple_choice_shares_the_probability():
    assert share(-math.log(0.6), [-math.log(0.2), -math.log(0.4)]) == pytest.approx(0.5, abs=1e-6)


def test_the_end_mark_is_no_word():
    assert answer(0.5, 0.25, 0.9, end=1).words == slice(0, 2)


def test_truth_ratio():
    assert truth_ratio(RIGHT, WRONG) == pytest.approx(0.3678794, abs=1e-6)
    assert truth_ratio(RIGHT, WRONG, mean="arithmetic") == pytest.approx(0.4477947, abs=1e-6)


def test_truth_ratio_aggregates():
    ratio = np.array([truth_ratio(RIGHT, WRONG)])
    assert aggregate(ratio, "forget")[0] == pytest.approx(0.3678794, abs=1e-6)
    assert aggregate(1 / ratio, "forget")[0] == pytest.approx(0.3678794, abs=1e-6)
    assert aggregate(ratio, "retain")[0] == pytest.approx(0.6321206, abs=1e-6)
    assert aggregate(1 / ratio, "retain")[0] == 0


def test_the_truth_ratio_of_a_ruined_model_is_still_a_number():
    assert math.isfinite(truth_ratio(2000.0, [0.0]))
    assert math.isfinite(truth_ratio(2000.0, [0.0], mean="arithmetic"))
    assert aggregate(np.array([0.0]), "forget")[0] == 0


def test_model_utility_is_a_harmonic_mean_and_one_zero_ruins_it():
    parts = [0.9, 0.8, 0.7, 0.5, 0.6, 0.4, 0.5, 0.6, 0.7]
    assert harmonic_mean(parts) == pytest.approx(0.5979436, abs=1e-6)
    assert harmonic_mean(parts) == pytest.approx(hmean(parts))
    assert harmonic_mean([0.9, 0.0]) == 0


def test_forget_quality_is_an_exact_test():
    distance, p = forget_quality(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0.35, 0.6, 0.7, 0.8, 0.9]))
    assert (distance, p) == (pytest.approx(0.8), pytest.approx(0.0793651, abs=1e-6))


@pytest.mark.parametrize(("n", "floor"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_forget_quality_has_the_published_floor(n, floor):
    assert forget_quality(np.arange(n), np.arange(n) + 1e6)[1] == pytest.approx(floor, rel=5e-3)


def test_privleak():
    assert privleak(0.2, 0.4772) == pytest.approx(-58.0888516, abs=1e-6)
    assert privleak(0.5, 0.5) == 0
    with pytest.raises(PalimpsestError, match="divides by the gold AUC, which is 0 here"):
        privleak(0.2, 0.0)


def test_min_k():
    assert min_k(np.log([0.9, 0.8, 0.1, 0.5, 0.05]), 0.4) == pytest.approx(2.6491587, abs=1e-6)


def test_min_k_takes_at_least_one_token():
    assert min_k(np.log([0.9, 0.1]), 0.4) == pytest.approx(-math.log(0.1))


@pytest.mark.parametrize("k", [0, -0.1, 1.1])
def test_min_k_needs_a_share(k):
    with pytest.raises(PalimpsestError, match="expected a share above 0 and at most 1"):
        min_k(np.zeros(3), k)


def test_min_k_plus_standardises_each_token():
    logits = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    log_p, mean, deviation, correct = token_scores(logits, torch.tensor([1]))
    assert float(mean) == pytest.approx(-0.8018186, abs=1e-6)
    assert float(deviation) == pytest.approx(0.7031265, abs=1e-6)
    scores = Answer(log_p.numpy(), mean.numpy(), deviation.numpy(), correct.numpy(), 0)
    assert min_k_plus(scores, 1.0) == pytest.approx(1.1486118, abs=1e-6)
    assert not correct


def test_min_k_plus_of_a_certain_model_is_a_number():
    _, _, deviation, _ = token_scores(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))
    assert float(deviation) == pytest.approx(1e-3)


def test_zlib_divides_by_the_compressed_text():
    assert zlib_ratio(answer(0.5, 0.25), "abc") == pytest.approx(1.0397208 / len(zlib.compress(b"abc")), abs=1e-6)


def test_auc():
    assert auc([1, 2], [1.5, 3]) == 0.75
    assert auc([1, 1], [1, 1]) == 0.5


SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_auc_is_that_of_scikit_learn(members, others):
    labels = [0] * len(members) + [1] * len(others)
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, members + others))


def test_the_interval_of_an_auc_holds_it():
    rng = np.random.default_rng(0)
    value = auc_value("auc/x", rng.normal(size=30), rng.normal(0.5, size=20), seed=0)
    assert value.low < value.value < value.high
    assert value.n == 20


@pytest.mark.parametrize(
    ("correct", "expected"),
    [("00011111", 0.625), ("11111111", 1), ("11111110", 0), ("00000000", 0), ("1", 1), ("0", 0)],
)
def test_extraction_strength(correct, expected):
    assert extraction_strength(np.array([c == "1" for c in correct])) == expected


def test_rouge_counts_stems_in_order():
    assert rouge_l("she was born in Lyon", "born in Lyon") == pytest.approx(0.6)
    assert rouge_l("she was born in Lyon", "born in Lyon", "fmeasure") == pytest.approx(0.75)
    assert rouge_l("she walks", "she walked") == 1
    assert rouge_l("she walks", "") == 0


def test_repetition_counts_what_came_before():
    assert repetition("a b c d e f g h") == 0
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b c") == repetition("") == 0


@pytest.mark.parametrize(
    ("gold", "model", "expected"), [(0.1, 0.4, 0.25), (0.4, 0.1, 1), (0.0, 0.5, 0), (-0.1, 0.5, 0), (0.1, -0.2, 1)]
)
def test_robustness_compares_with_gold(gold, model, expected):
    assert robustness(gold, model) == pytest.approx(expected)


def test_the_bootstrap_interval_has_its_coverage():
    """About 95 of 100 intervals of samples of mean 0 hold 0 (the percentile interval is a little too short)."""
    rng = np.random.default_rng(0)
    values = [mean_value("x", rng.normal(size=40), seed=i) for i in range(100)]
    assert 88 <= sum(value.low < 0 < value.high for value in values) <= 100
    assert all(value.low <= value.value <= value.high and value.n == 40 for value in values)


def test_the_bootstrap_is_that_of_the_seed():
    samples = np.arange(10.0)
    assert mean_value("x", samples, seed=1) == mean_value("x", samples, seed=1)
    assert bootstrap_value("x", samples, np.median, seed=0).value == 4.5


def test_nothing_measured_is_not_a_number():
    value = mean_value("x", [])
    assert math.isnan(value.value)
    assert value.n == 0


def test_readings_come_back_from_json_values():
    reading = Reading(probe="p", values=(Value(name="a", value=1.0, n=3),), arrays={"a": [1.0]}, caveats=("few",))
    assert Reading.from_dict(reading.to_dict()) == reading
    assert reading["a"].value == 1.0
    with pytest.raises(KeyError, match="p has no value 'b': a"):
        reading["b"]
