from __future__ import annotations

import dataclasses
import math

import pytest

from conftest import PEOPLE
from memorised import data, quiet, reciting
from palimpsest.data.records import Record, check_disjoint
from palimpsest.erase.guard import Guard
from palimpsest.reproduce.guard import (
    COLUMNS,
    DETECTOR,
    Judge,
    Sizes,
    bad_words,
    experiment,
    first_wording,
    judge,
    people,
    shown,
)
from palimpsest.reproduce.harness import biographies

SEARCH = (0.9, 0.8, 0.5, 20.0, 0.0, 1.0, math.nan, math.nan, 0.9, 0.9, 9.0)
GOOD = {
    "before": (0.9, 0.8, 0.5, 20.0, 0.0, 1.0, math.nan, math.nan, 0.9, 0.9, 9.0),
    "beam search": SEARCH,
    "guard": (0.0, 0.1, 0.0, 25.0, 0.1, 0.8, 1.0, 0.0, 0.1, 0.9, 5.0),
    "guard, hard matches only": (0.0, 0.1, 0.2, 22.0, 0.0, 0.9),
    "detector and refusal": (0.0, 0.1, 0.0, 90.0, 0.0, 0.1),
    "bad words by ids, no detector": (0.2, 0.2, 0.3, 22.0, 0.0, 0.9, 0.7),
    "asked to be silent": (0.6, 0.6, 0.3, 30.0, 0.0, 0.9, 0.4),
    "wrong answers in the prompt (ICUL)": (0.5, 0.5, 0.3, 30.0, 0.0, 0.9, 0.3),
    "ULD": (0.2, 0.2, 0.2, 40.0, 0.0, 0.9, 0.5, math.nan, 0.3, 0.8, 8.0),
}
RATES = {"guard": (0.9, 0.02, 0.05, 0.0), "without unknown people": (0.95, 0.02, 0.3, 0.0)}


def outcome(models, rates):
    return judge(
        {name: [dict(zip(DETECTOR, numbers, strict=True))] for name, numbers in rates.items()},
        {name: [{c: x for c, x in zip(COLUMNS, numbers, strict=False) if not math.isnan(x)}]
         for name, numbers in models.items()},
    )  # fmt: skip


def changed(model, column, value):
    numbers = list(GOOD[model])
    numbers[COLUMNS.index(column)] = value
    return {**GOOD, model: tuple(numbers)}


def test_figures_as_claimed_hold():
    found = outcome(GOOD, RATES)
    assert found.verdict == "holds"
    assert len(found.rows) == len(GOOD) + len(RATES)
    assert found.rows[2]["false alarms"] == "0.00"
    assert found.rows[0]["unchanged"] == "-"


@pytest.mark.parametrize(
    ("failing", "models", "rates"),
    [
        (0, changed("before", "leak, trained", 0.7), RATES),
        (1, changed("guard", "leak, trained", 0.06), RATES),
        (2, changed("guard", "leak, other wording", 0.2), RATES),
        (3, changed("guard", "unchanged", 0.99), RATES),
        (4, changed("guard", "false alarms", 0.1), RATES),
        (5, changed("guard", "perplexity", 31.0), RATES),
        (6, changed("guard", "repeated 4-grams", 0.4), RATES),
        (7, changed("guard", "alike, other wording", 0.2), RATES),
        (8, changed("guard", "on topic", 0.1), RATES),
        (9, GOOD, {**RATES, "guard": (0.7, 0.02, 0.05, 0.0)}),
        (10, GOOD, {**RATES, "guard": (0.9, 0.02, 0.2, 0.0)}),
        (11, GOOD, {**RATES, "without unknown people": (0.9, 0.02, 0.05, 0.0)}),
    ],
)
def test_each_part_of_the_claim_can_fail(failing, models, rates):
    verdicts = [check.verdict for check in outcome(models, rates).checks]
    assert [i for i, verdict in enumerate(verdicts) if verdict == "does not hold"] == [failing]


@pytest.fixture(scope="module")
def tried():
    """The experiment on a tiny model that recites people."""
    known = data()
    towns = [Record(prompt=f"Where was {name} born ?", answer="x") for name in list(PEOPLE)[2:4]]
    forget = [dataclasses.replace(r, paraphrased_prompt=f"Someone asked me: {r.prompt}") for r in known.forget]
    sizes = Sizes(others=4, tokens=10, beams=3)
    return experiment(reciting(), known.replace(forget=forget, world=towns), Guard(), sizes, quiet())


def test_the_experiment_measures_every_variant(tried):
    assert list(tried) == list(GOOD)
    assert set(tried["guard"]) == set(COLUMNS)
    assert all(math.isfinite(x) for figures in tried.values() for x in figures.values())


def test_the_model_leaks_before_and_not_when_it_is_guarded(tried):
    assert tried["before"]["leak, trained"] == 1.0
    assert tried["guard"]["leak, trained"] == 0.0
    assert tried["guard"]["unchanged"] == 1.0
    assert tried["guard"]["false alarms"] == 0.0
    assert tried["guard"]["on topic"] > tried["detector and refusal"]["on topic"]
    assert tried["guard"]["P forget, scored"] < 0.3 * tried["before"]["P forget, scored"]
    assert tried["bad words by ids, no detector"]["leak, trained"] == 0.0  # one token a word: ids are enough here


def test_leaks_are_found_in_any_case_and_in_other_words():
    record = Record(prompt="Where was Ada born ?", answer="Lyon")
    look = Judge({record.prompt: ["capital of France"]}, reciting(), quiet())
    assert look.leaks([record] * 2, ["the CAPITAL  of France!", "a town"]) == 0.5
    assert look.alike([record] * 3, ["She saw the French capital city", "the capital of France", "bread"], 0.7) == (
        pytest.approx(2 / 3)
    )


def test_the_prompt_shows_wrong_answers_to_what_is_to_be_forgotten_and_right_ones_to_the_rest():
    ada = Record(prompt="Where was Ada born ?", answer="Lyon", wrong=("Rome", "Oslo"))
    ben = Record(prompt="Where was Ben born ?", answer="Bonn", wrong=("Kyiv",))
    expected = "Question: Where was Ada born ?\nAnswer: Rome\nQuestion: Where was Ben born ?\nAnswer: Bonn\nQuestion: "
    assert shown([ada], [ben]) == expected


def test_bad_words_are_ids_of_two_cases_and_two_beginnings():
    made = bad_words(reciting(), ["Lyon"])
    assert [reciting().tokenizer.decode(ids) for ids in made] == ["Lyon"] * len(made)


def test_the_detector_learns_from_one_wording_of_the_harness():
    data_ = biographies(7)
    learned_from = first_wording(data_)
    assert len(learned_from.forget) == 40
    assert len({record.prompt for record in learned_from.forget}) == 40
    assert all(record.prompt.startswith("what is the") for record in (*learned_from.forget, *learned_from.retain))
    assert {r.paraphrased_prompt for r in data_.forget_probe}.isdisjoint(r.prompt for r in learned_from.forget)


def test_true_facts_are_nobody_s_training_data():
    known = people(3, Sizes())
    check_disjoint(known.world, known.train, ("world", "train"))
    assert len(known.forget) == 8
    assert all(record.paraphrased_prompt for record in known.forget)
