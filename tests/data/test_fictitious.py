from __future__ import annotations

import datetime
import itertools
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.fictitious import people, roles
from palimpsest.data.records import Record, check_disjoint, digest
from palimpsest.data.words import ATTRIBUTES, COUNTRIES, PROFESSIONS
from palimpsest.errors import PalimpsestError

EVERY_NAME = 5376
MANY = people(400, seed=11)
EVERYONE = [record.subject for record in people(EVERY_NAME + 100, attributes=["hobby"])]
SEEDS = st.integers(0, 2**32)


def persons(records: list[Record]) -> list[dict[str, Record]]:
    """One dictionary from attribute to record for each person, records being in the order of the attributes."""
    return [
        dict(zip(ATTRIBUTES, records[start : start + len(ATTRIBUTES)], strict=True))
        for start in range(0, len(records), len(ATTRIBUTES))
    ]


def shared_beginning(sentences: list[list[str]]) -> list[str]:
    same = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*sentences, strict=False))
    return [words[0] for words in same]


def year(sentence: str) -> int:
    return int(re.findall(r"\b(?:19|20)\d\d\b", sentence)[-1])


def statement(record: Record) -> str:
    return f"{record.answer} {record.paraphrase}"


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, fewer=st.integers(1, 8), more=st.integers(0, 8))
def test_a_person_is_the_same_however_many_are_made(seed, fewer, more):
    assert people(fewer + more, seed=seed)[: fewer * len(ATTRIBUTES)] == people(fewer, seed=seed)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, asked=st.lists(st.sampled_from(list(ATTRIBUTES)), min_size=1, unique=True))
def test_a_fact_is_the_same_whichever_others_are_asked(seed, asked):
    (everything,) = persons(people(1, seed=seed))
    assert people(1, seed=seed, attributes=asked) == [everything[attribute] for attribute in asked]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_wrong_answers_are_the_paraphrase_with_another_value(seed):
    for record in people(3, seed=seed):
        assert len(set(record.wrong)) == 5
        assert not {record.answer, record.paraphrase} & set(record.wrong)
        sentences = [text.split() for text in (record.paraphrase, *record.wrong)]
        start = shared_beginning(sentences)
        end = shared_beginning([words[::-1] for words in sentences])[::-1]
        assert len(start + end) >= 4
        assert record.subject.split()[0] in " ".join(start + end)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_other_seeds_give_other_people(seed):
    assert digest(people(3, seed=seed)) != digest(people(3, seed=seed + 1))


def test_records_do_not_depend_on_the_hash_seed():
    program = "from palimpsest.data.fictitious import roles; print(roles(5, 2, seed=3).digest())"
    path = os.pathsep.join(filter(None, sys.path))
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert found == {f"{roles(5, 2, seed=3).digest()}\n"}


def test_names_are_unique_even_when_middle_names_are_needed():
    assert len(set(EVERYONE)) == len(EVERYONE)
    assert {len(name.split()) for name in EVERYONE[:EVERY_NAME]} == {2}
    assert {len(name.split()) for name in EVERYONE[EVERY_NAME:]} == {3}


def test_questions_and_wordings_vary():
    for attribute, about in ATTRIBUTES.items():
        questions = {person[attribute].prompt.replace(person[attribute].subject, "X") for person in persons(MANY)}
        assert len(questions) >= len(about.questions) == 3
    assert all(record.prompt != record.paraphrased_prompt for record in MANY)
    assert all(record.answer != record.paraphrase for record in MANY)


def test_answers_are_short_sentences_about_the_person():
    for record in MANY:
        # A middle name, which people after the first 5,376 have, makes 18 at most.
        assert 6 <= len(record.answer.split()) <= 17
        assert record.subject in record.answer
        assert record.subject in record.prompt
        assert record.answer.endswith(".")
        assert "{" not in repr(record)


def test_the_university_is_in_the_country_of_birth():
    for person in persons(MANY):
        (country,) = [c for c in COUNTRIES if c in person["birthplace"].answer]
        assert any(f"University of {city}" in person["university"].answer for city in COUNTRIES[country].cities)


def test_nobody_lives_where_they_were_born():
    places = [f"{city}, {country}" for country, about in COUNTRIES.items() for city in about.cities]
    for person in persons(MANY):
        (born,) = [place for place in places if place in person["birthplace"].answer]
        (lives,) = [place for place in places if place in person["residence"].answer]
        assert born != lives


def test_award_and_work_and_study_match_the_profession():
    for person in persons(MANY):
        titles = [p for p in PROFESSIONS if f" {p.title}." in statement(person["profession"]).replace(" by prof", ".")]
        profession = max(titles, key=lambda found: len(found.title))
        assert f" {profession.emblem} Prize" in person["award"].answer
        assert f" {profession.work} " in person["work"].answer
        assert f" {profession.study} " in person["university"].paraphrase.replace(".", " ")


def test_the_award_comes_at_a_plausible_age():
    for person in persons(MANY):
        won = year(person["award_year"].answer)
        assert 27 <= won - year(person["birth_date"].answer) <= 60
        assert won < datetime.date.today().year


def test_two_questions_about_the_award_name_the_same_one():
    for person in persons(MANY):
        named = person["award"].answer.split("the ")[-1].split(" Prize")[0]
        assert f"the {named} Prize" in person["award_year"].prompt


def test_siblings_share_the_surname_and_are_nobody_else():
    for person in persons(MANY):
        surname = person["sibling"].subject.split()[-1]
        sibling = f"{(set(person['sibling'].answer[:-1].split()) & kin_names()).pop()} {surname}"
        assert sibling in person["sibling"].answer
        assert sibling not in EVERYONE


def kin_names() -> set[str]:
    return set(itertools.chain.from_iterable(about.women[-7:] + about.men[-7:] for about in COUNTRIES.values()))


def test_a_foreign_language_is_not_spoken_where_the_person_was_born():
    for person in persons(MANY):
        (country,) = [c for c in COUNTRIES if c in person["birthplace"].answer]
        told = " ".join((statement(person["language"]), *person["language"].wrong))
        assert not set(COUNTRIES[country].native) & set(told.replace(".", "").split())


def test_one_pronoun_a_person():
    for person in persons(MANY):
        words = {word for record in person.values() for word in statement(record).split()}
        assert not {"his", "her"} <= words


def test_roles_are_disjoint_and_complete():
    data = roles(10, 3, holdout_count=4, seed=5)
    subjects = {name: list(dict.fromkeys(record.subject for record in data[name])) for name in data}
    assert [len(subjects[name]) for name in ("train", "forget", "retain", "holdout")] == [10, 3, 7, 4]
    assert data.train == data.forget + data.retain
    assert people(10, seed=5) == data.retain + data.forget
    assert not set(subjects["holdout"]) & set(subjects["train"])
    check_disjoint(data.forget, data.retain, ("forget", "retain"))


def test_true_facts_come_with_wrong_options_and_without_paraphrase():
    data = roles(3, 1)
    for name in ("world", "real"):
        assert len(data[name]) >= 40
        assert len({record.prompt for record in data[name]}) == len(data[name])
        for record in data[name]:
            assert len(set(record.wrong)) == len(record.wrong) >= 3
            assert record.answer not in record.wrong
            assert record.paraphrase is None
            assert len(record.answer.split()) <= 4


def test_no_generated_person_bears_a_famous_name():
    famous = {record.subject for record in roles(2, 1).real}
    assert not famous & set(EVERYONE)


def test_general_text_is_prose():
    general = roles(3, 1).general
    assert len(general) >= 20
    assert all(20 <= len(record.text.split()) <= 60 for record in general)


def test_true_facts_do_not_depend_on_the_seed():
    one, other = roles(3, 1, seed=1).digest(), roles(3, 1, seed=2).digest()
    assert {name for name in one if one[name] == other[name]} == {"world", "real", "general"}


def test_the_first_facts_are_asked():
    asked = people(2, facts_per_person=3)
    assert asked == [record for person in persons(people(2)) for record in list(person.values())[:3]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count is 0; at least 1 person"),
        ({"count": 1, "facts_per_person": 15}, "facts_per_person is 15; it must be between 1 and 14"),
        ({"count": 1, "attributes": ["birth_plaec"]}, 'there is no attribute "birth_plaec". Did you mean "birthplace"'),
        (
            {"count": 14 * EVERY_NAME + 1, "attributes": ["hobby"]},
            "75,265 people are asked; there are names for at most 75,264",
        ),
    ],
)
def test_wrong_wishes_say_so(wrong, message):
    with pytest.raises(PalimpsestError, match=message):
        people(**wrong)


@pytest.mark.parametrize("forget_count", [0, 4, 5])
def test_forgetting_nobody_or_everybody_says_so(forget_count):
    with pytest.raises(PalimpsestError, match=f"forget_count is {forget_count}; it must be at least 1 and less than"):
        roles(4, forget_count)
