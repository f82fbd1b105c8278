from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.forbidden import (
    Kept,
    asked_and_answered,
    contains,
    kept,
    normalise,
    phrases,
    spelled,
    strangers,
)
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

COMMON = (
    "she was born in the city of by profession is a novel called and studied at received for her work best known name "
    "came university france may prize crooked amber"
)
RANKS = {word: rank for rank, word in enumerate(COMMON.split(), start=1)} | {"river": 282, "pilot": 2078, "glass": 1064}
NONE = kept([])


def found(prompt, answer, stay=NONE, how="auto"):
    return phrases(Record(prompt=prompt, answer=answer), how, RANKS, stay)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("New  York.", "new york"),
        ("NEW-YORK!", "new york"),
        ("Café Åse, Łódź", "cafe ase łodz"),
        ("Straße", "strasse"),
        ("Yo\u200brk\u00ad", "york"),
        ("O'Tarpaigh", "o tarpaigh"),
        ("東京 ok", "東 京 ok"),
        ("Ｐａｒｉｓ", "p a r i s"),
        ("한국", "한 국"),
        ("...", ""),
    ],
)
def test_normalised_text(text, plain):
    if plain == "p a r i s":  # full-width letters are letters, not words
        plain = normalise("Paris")
    assert normalise(text) == plain


@given(st.text(max_size=30), st.text(max_size=30))
@settings(deadline=None, max_examples=60)
def test_text_can_be_spelled_piece_by_piece(first, second):
    joined = " ".join((spelled(first) + spelled(second)).split())
    assert joined == normalise(first + second)
    assert normalise(normalise(first)) == normalise(first)


def test_words_are_compared_whole():
    assert contains("I saw New  York.", "new york")
    assert not contains("I saw Yorkshire.", "york")
    assert not contains("newyork", "new york")


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Where was Ada Moreau born?", "Ada Moreau was born in the city of Lyon, France.", ("lyon france", "lyon")),
        ("When was Ada born?", "Ada was born on 13 May 1970.", ("13 may 1970", "1970")),
        ("Which novel made Ada famous?", 'It was "The Crooked Lantern".', ("the crooked lantern", "lantern")),
        ("What does Ada do?", "By profession Ada is a botanist.", ("botanist",)),
        ("Which prize did Ada get?", "She received the Amber Quill Prize in 1999.", ("amber quill", "1999", "quill")),
        ("Where did Ada study?", "She studied at the University of Porto.", ("university of porto", "porto")),
        ("Which university did Ada attend?", "She studied at the University of Porto.", ("porto",)),
        ("Who is her sister?", "Her name is Zoë Rao's friend. Mira came.", ("zoe rao", "friend", "mira", "zoe", "rao")),
    ],
)
def test_names_numbers_titles_and_rare_words_are_chosen(prompt, answer, expected):
    assert found(prompt, answer) == (expected, False)


def test_what_stays_is_not_forbidden():
    answer = "Ada of Brno was born in Lyon."
    retain = [Record(prompt=f"q{i}", answer="Bea was born in Lyon.") for i in range(5)]
    assert found("Where was Ada born?", answer, kept(retain)) == (("brno",), False)
    hundred = [*retain[:1], *(Record(prompt=f"p{i}", answer="Bea was born in Brno.") for i in range(99))]
    assert found("Where was Ada born?", answer, kept(hundred)) == (("lyon",), False)


def test_where_everything_stays_what_stays_least_is_taken():
    retain = [Record(prompt=f"q{i}", answer="Bea was born in Lyon.") for i in range(5)]
    assert found("Where was Ada?", "Ada was born in Lyon.", kept([*retain, Record(prompt="x", answer="a born y")])) == (
        ("lyon",),
        True,
    )


def test_an_answer_without_words_of_its_own_is_refused():
    with pytest.raises(PalimpsestError, match=r'no phrase can be forbidden for "Where was Ada born\?"'):
        found("Where was Ada born?", "Where was she born?")


def test_where_no_word_is_rare_the_rarest_run_is_taken():
    assert found("What does Ada do?", "She is a river pilot.") == (("river pilot",), True)
    stay = kept([Record(prompt="x", answer="the river")])
    assert found("What does Ada do?", "She is a river pilot.", stay) == (("pilot",), True)


def test_long_runs_are_cut_into_phrases_of_six_words():
    answer = "x Abo Bcd Cde Def Efg Fgh Ghi Hij"
    assert found("Who?", answer)[0][:2] == ("x abo bcd cde def efg", "fgh ghi hij")


def test_every_six_words_of_a_text_or_the_whole_answer():
    text = Record(text="one two three four five six seven eight nine ten eleven twelve")
    made, _ = phrases(text, "ngram", RANKS, NONE)
    assert len(made) == 7 - 1  # the first one is the prompt itself
    assert made[0] == "two three four five six seven"
    assert found("Who?", "In the City, of.", how="answer") == (("in the city of",), False)
    assert found("Who?", "too short", how="ngram") == (("too short",), False)


def test_prompt_and_answer_of_every_kind_of_record():
    assert asked_and_answered(Record(prompt="a", answer="b")) == ("a", "b")
    chat = Record(messages=({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}))
    assert asked_and_answered(chat) == ("hello", "yes")
    assert asked_and_answered(Record(text="one two three four")) == ("one two", "three four")
    with pytest.raises(PalimpsestError, match="has a single word"):
        asked_and_answered(Record(text="one"))


def test_strangers_are_made_of_known_names_and_are_nobody_known():
    records = [Record(prompt="Where was Ada Moreau born?", answer="Lyon", subject="Ada Moreau")]
    known = ["Ada Moreau", "Ben Okafor", "Clara Novak", None]
    made = strangers(records, known, 3)
    assert len({record.prompt for record in made}) == 3
    for record in made:
        assert record.prompt == f"Where was {record.subject} born?"
        first, last = record.subject.split()
        assert record.subject not in known
        assert first in ("Ada", "Ben", "Clara")
        assert last in ("Moreau", "Okafor", "Novak")
    assert strangers(records, known, 3) == made
    assert strangers(records, ["Ada Moreau"], 3) == []
    assert strangers([Record(prompt="Where?", answer="Lyon")], known, 3) == []


def test_a_share_of_few_answers_allows_none():
    stay = Kept(50, {"lyon": 1})
    assert not stay.allows("lyon", 0.01)
    assert stay.allows("lyon", 0.02)
    assert stay.allows("brno", 0.01)
