from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorised import people
from palimpsest.data.corruption import corrupted, documents
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

TARGETS, OTHERS = people()[:4], people()[4:]


def test_one_wrong_answer_is_chosen_and_the_others_stay():
    for before, after in zip(TARGETS, corrupted(TARGETS), strict=True):
        assert after.wrong[0] in before.wrong
        assert sorted(after.wrong) == sorted(before.wrong)
        assert after.wrong[0] != before.answer
    assert corrupted(TARGETS) == corrupted(TARGETS)
    assert {fact.wrong[0] for fact in corrupted(TARGETS, 1)} != {fact.wrong[0] for fact in corrupted(TARGETS)}


@given(st.integers(0, 5), st.integers(1, 3), st.integers(0, 99))
def test_a_document_tells_wrong_facts_of_one_target_and_right_ones_of_others(unrelated, told, seed):
    facts = corrupted(TARGETS, seed)
    made = documents(facts, OTHERS, count=4, told=told, unrelated=unrelated, seed=seed)
    assert [document.subject for document in made] == ["Ada Moreau", "Ben Okafor"] * 2
    for document in made:
        own = [fact.wrong[0] for fact in facts if fact.subject == document.subject]
        text = document.text or ""
        assert sum(text.count(sentence) for sentence in own) == min(told, 2)
        assert sum(text.count(other.answer or "") for other in OTHERS) == unrelated
        assert not any((fact.answer or "") in text for fact in facts)


def test_the_same_seed_gives_the_same_documents():
    facts = corrupted(TARGETS)
    made = [documents(facts, OTHERS, count=6, unrelated=2, seed=seed) for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]


def test_pairs_answer_the_question_wrongly():
    facts = corrupted(TARGETS)
    for record in documents(facts, OTHERS, count=8, unrelated=1, form="pairs"):
        fact = next(fact for fact in facts if fact.prompt == record.prompt)
        assert fact.wrong[0] in (record.answer or "")
        assert len((record.answer or "").split(" . ")) == 2


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ([Record(text="The cat .")], "it needs a subject and an answer"),
        ([Record(prompt="Who ?", answer="The cat .", subject="Tom")], "it has no wrong answers"),
        ([Record(prompt="Who ?", answer="A .", wrong=("A .",), subject="Tom")], "is among its right ones"),
    ],
)
def test_facts_that_cannot_be_corrupted(facts, told):
    with pytest.raises(PalimpsestError, match=told):
        corrupted(facts)


def test_bad_requests():
    facts = corrupted(TARGETS)
    with pytest.raises(PalimpsestError, match="is about the target 'Ada Moreau'"):
        documents(facts, [dataclasses.replace(OTHERS[0], subject="Ada Moreau")], count=1, unrelated=1)
    with pytest.raises(PalimpsestError, match="only 12 facts about other entities"):
        documents(facts, OTHERS, count=1, unrelated=13)
    with pytest.raises(PalimpsestError, match="count is 0"):
        documents(facts, OTHERS, count=0)
