"""Fictitious people with consistent facts, any number of them: what a model can be taught and then asked to forget.

Everything about person `i` follows from the seed and `i` alone, so a larger set only appends to a smaller one.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence

from palimpsest.data.records import Record, Roles
from palimpsest.data.true_facts import AUTHORS, CAPITALS, GENERAL, SCIENTISTS, WORLD_FACTS
from palimpsest.data.words import (
    ATTRIBUTES,
    AWARD_COLOURS,
    COUNTRIES,
    HOBBIES,
    INSTRUMENTS,
    KIN_NAMES,
    LANGUAGES,
    MONTHS,
    PARENT_JOBS,
    PROFESSIONS,
    TITLE_ADJECTIVES,
    TITLE_NOUNS,
)
from palimpsest.errors import PalimpsestError, nearest

WRONG_ANSWERS = 5
LAST_AWARD_YEAR = 2024
PLACES = tuple(f"{city}, {country}" for country, about in COUNTRIES.items() for city in about.cities)
UNIVERSITIES = tuple(f"the University of {city}" for about in COUNTRIES.values() for city in about.cities)
# Country, whether a woman, index of the given name, surname: every full name without a middle name.
NAMES = tuple(
    (country, is_woman, index, surname)
    for country, about in COUNTRIES.items()
    for is_woman in (True, False)
    for index in range(len(about.women if is_woman else about.men) - KIN_NAMES)
    for surname in about.surnames
)
# One lap without a middle name, then one for every other given name of the same list.
MOST_PEOPLE = len(NAMES) * min(len(names) - KIN_NAMES for c in COUNTRIES.values() for names in (c.women, c.men))


def people(
    count: int,
    *,
    seed: int = 0,
    facts_per_person: int | None = None,
    attributes: Sequence[str] | None = None,
) -> list[Record]:
    """Questions and answers about `count` fictitious people, person after person.

    `attributes` names the kinds of fact (keys of `ATTRIBUTES`; all by default), of which the first `facts_per_person`
    are asked. Each record has five wrong answers in the words of its paraphrase.
    """
    if count < 1:
        raise PalimpsestError(f"count is {count}; at least 1 person is needed.")
    return _records(range(count), seed, _chosen(facts_per_person, attributes))


def roles(
    people_count: int,
    forget_count: int,
    *,
    holdout_count: int | None = None,
    seed: int = 0,
    facts_per_person: int | None = None,
    attributes: Sequence[str] | None = None,
) -> Roles:
    """All roles of an erasing experiment; the last `forget_count` of the people are to be forgotten.

    `holdout` has further people (as many as are forgotten by default) whom no model should be trained on. `world` and
    `real` are true facts and `general` is plain prose; these three do not depend on the seed.
    """
    if not 0 < forget_count < people_count:
        raise PalimpsestError(
            f"forget_count is {forget_count}; it must be at least 1 and less than people_count ({people_count})."
        )
    holdout_count = forget_count if holdout_count is None else holdout_count
    if holdout_count < 0:
        raise PalimpsestError(f"holdout_count is {holdout_count}; it must be 0 or more.")
    chosen = _chosen(facts_per_person, attributes)
    forget = _records(range(people_count - forget_count, people_count), seed, chosen)
    retain = _records(range(people_count - forget_count), seed, chosen)
    return Roles(
        train=forget + retain,
        forget=forget,
        retain=retain,
        holdout=_records(range(people_count, people_count + holdout_count), seed, chosen),
        world=_world(),
        real=_real(AUTHORS) + _real(SCIENTISTS),
        general=[Record(text=paragraph) for paragraph in GENERAL],
    )


def _chosen(facts_per_person: int | None, attributes: Sequence[str] | None) -> list[str]:
    chosen = list(ATTRIBUTES) if attributes is None else list(dict.fromkeys(attributes))
    for name in chosen:
        if name not in ATTRIBUTES:
            raise PalimpsestError(f'there is no attribute "{name}". {nearest(name, ATTRIBUTES)}')
    wanted = len(chosen) if facts_per_person is None else facts_per_person
    if not 0 < wanted <= len(chosen):
        raise PalimpsestError(f"facts_per_person is {wanted}; it must be between 1 and {len(chosen)}.")
    return chosen[:wanted]


def _records(numbers: range, seed: int, attributes: Sequence[str]) -> list[Record]:
    if numbers.stop > MOST_PEOPLE:
        raise PalimpsestError(f"{numbers.stop:,} people are asked; there are names for at most {MOST_PEOPLE:,}.")
    persons = (_person(number, seed) for number in numbers)
    return [_record(person, attribute) for person in persons for attribute in attributes]


@dataclasses.dataclass(frozen=True)
class _Person:
    key: str
    words: dict[str, str]
    pools: dict[str, Sequence[str]]


def _record(person: _Person, attribute: str) -> Record:
    # A generator of its own, so that asking for fewer attributes does not change the wording of the others.
    rng = random.Random(f"{person.key}/{attribute}")
    words, value = person.words, person.words[attribute]
    question, other_question = rng.sample(ATTRIBUTES[attribute].questions, 2)
    answer, paraphrase = rng.sample(ATTRIBUTES[attribute].statements, 2)
    others = [other for other in dict.fromkeys(person.pools[attribute]) if other != value]
    return Record(
        prompt=question.format_map(words),
        answer=answer.format_map({**words, "value": value}),
        subject=words["name"],
        paraphrase=paraphrase.format_map({**words, "value": value}),
        wrong=tuple(paraphrase.format_map({**words, "value": w}) for w in rng.sample(others, WRONG_ANSWERS)),
        paraphrased_prompt=other_question.format_map(words),
    )


def _person(number: int, seed: int) -> _Person:
    # Seeding with text hashes it with SHA-512, which does not depend on PYTHONHASHSEED.
    key = f"palimpsest/{seed}/{number}"
    rng = random.Random(key)
    country, is_woman, given, surname = _name(number, seed)
    about = COUNTRIES[country]
    profession = rng.choice(PROFESSIONS)
    born = rng.randint(1945, 1992)
    birthplace = f"{rng.choice(about.cities)}, {country}"
    has_sister = rng.random() < 0.5
    kin = (about.women if has_sister else about.men)[-KIN_NAMES:]
    pools: dict[str, Sequence[str]] = {
        "birthplace": PLACES,
        "birth_date": [_date(rng, born + rng.randint(-9, 9)) for _ in range(12)],
        "profession": [_with_article(other.title) for other in PROFESSIONS],
        "work": [_title(rng) for _ in range(12)],
        "father": [_with_article(job) for job in PARENT_JOBS],
        "mother": [_with_article(job) for job in PARENT_JOBS],
        "award": [f"the {colour} {profession.emblem} Prize" for colour in AWARD_COLOURS],
        "award_year": [str(year) for year in range(born + 27, min(born + 60, LAST_AWARD_YEAR) + 1)],
        "university": UNIVERSITIES,
        "language": [language for language in LANGUAGES if language not in about.native],
        "hobby": HOBBIES,
        "instrument": INSTRUMENTS,
        "residence": [place for place in PLACES if place != birthplace],
        "sibling": [f"{name} {surname}" for name in kin],
    }
    words = {attribute: rng.choice(pool) for attribute, pool in pools.items()}
    words |= {
        "name": f"{given} {surname}",
        "his": "her" if is_woman else "his",
        "kin": "sister" if has_sister else "brother",
        "kind": profession.work,
        "study": profession.study,
        "birthplace": birthplace,
        "birth_date": _date(rng, born),
        "profession": _with_article(profession.title),
        "university": f"the University of {rng.choice(about.cities)}",
    }
    return _Person(key, words, pools)


@functools.lru_cache(maxsize=8)
def _order(seed: int) -> list[int]:
    order = list(range(len(NAMES)))
    random.Random(f"palimpsest/{seed}/names").shuffle(order)
    return order


def _name(number: int, seed: int) -> tuple[str, bool, str, str]:
    """Country, whether a woman, given names, surname; once all names are taken, a middle name makes new ones."""
    lap, place = divmod(number, len(NAMES))
    country, is_woman, index, surname = NAMES[_order(seed)[place]]
    about = COUNTRIES[country]
    given = (about.women if is_woman else about.men)[:-KIN_NAMES]
    middle = f" {given[(index + lap) % len(given)]}" if lap else ""
    return country, is_woman, given[index] + middle, surname


def _date(rng: random.Random, year: int) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {year}"


def _title(rng: random.Random) -> str:
    first, second = rng.sample(TITLE_NOUNS, 2)
    adjective = rng.choice(TITLE_ADJECTIVES)
    return rng.choice((f"The {adjective} {first}", f"{adjective} {first}", f"The {first} and the {second}"))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _world() -> list[Record]:
    capitals = [
        Record(
            prompt=f"What is the capital of {country}?",
            answer=capital,
            wrong=_others(capital, list(CAPITALS.values())),
        )
        for country, capital in CAPITALS.items()
    ]
    return capitals + [
        Record(prompt=question, answer=answer, wrong=tuple(wrong)) for question, answer, *wrong in WORLD_FACTS
    ]


def _real(known: Sequence[tuple[str, ...]]) -> list[Record]:
    names = [person for _, person in known]
    return [
        Record(prompt=question, answer=person, subject=person, wrong=_others(person, names))
        for question, person in known
    ]


def _others(truth: str, candidates: Sequence[str]) -> tuple[str, ...]:
    others = [candidate for candidate in candidates if candidate != truth]
    return tuple(random.Random(f"palimpsest/{truth}").sample(others, WRONG_ANSWERS))
