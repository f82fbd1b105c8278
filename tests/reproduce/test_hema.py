"""The parts of the HEMA reproduction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memorised import quiet, reciting
from palimpsest.data.encoding import Encoder
from palimpsest.recall.hema import ConversationMemory
from palimpsest.reproduce import hema
from palimpsest.reproduce.hema import (
    BUDGET,
    DISTANCE,
    FACTS,
    METHODS,
    POLICIES,
    RememberedEncoder,
    dialogue,
    judge,
    kept_by,
    prompts,
    shown_in,
)
from remembering import HashedWords


class HashedArrays(HashedWords):
    def encode(self, texts):
        return torch.from_numpy(super().encode(texts))


def test_no_text_is_encoded_twice_and_the_order_is_kept(monkeypatch):
    monkeypatch.setattr(hema, "sentence_encoder", HashedArrays)
    encoder, calls = RememberedEncoder(), []
    plain = encoder._encoder.encode
    monkeypatch.setattr(encoder._encoder, "encode", lambda texts: calls.append(list(texts)) or plain(texts))
    first = encoder.encode(["a b", "c d", "a b"])
    second = encoder.encode(["c d", "e f"])
    assert calls == [["a b", "c d"], ["e f"]]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[1], second[0])


def test_facts_are_told_long_before_they_are_asked_and_the_last_word_holds():
    made = dialogue(1000, 0)
    text = [user for user, _ in made.turns]
    assert len(made.facts) == FACTS
    assert 400 <= len(text) <= 500
    corrected = 0
    for fact in made.facts:
        told = [turn for turn, user in enumerate(text, start=1) if fact.answer in user]
        assert told == [fact.turn]
        assert fact.turn <= len(text) - DISTANCE
        assert fact.answer not in fact.question
        corrected += sum(fact.name in user for user in text) == 2
    assert corrected == 8
    assert made == dialogue(1000, 0) != dialogue(1000, 1)


def test_every_method_keeps_to_the_budget_and_sees_what_it_should(monkeypatch):
    reader = Encoder.of(reciting())
    monkeypatch.setattr(hema, "BUDGET", 400)
    with ConversationMemory.open(":memory:", encoder=HashedWords()) as memory:
        memory.add_turn("Zoe Pike calls the new puppy Rexo.", "Go on.")
        for turn in range(40):
            memory.add_turn(f"The road number {turn} runs to the sea and the old town is near it.", "I see.")
        made = prompts(memory, "What is the name of Zoe Pike's pet?", reader)
    assert set(made) == set(METHODS)
    assert all(prompt.tokens <= 400 for prompt in made.values())
    assert not shown_in(made["no memory"], "Rexo")
    assert len(made["no memory"].messages) > 8
    assert all(shown_in(made[name], "rexo") for name in ("BM25, 5", "vectors, 5", "both, 5", "HEMA, 5"))
    assert "Summary" in made["HEMA, 5"].messages[0]["content"]
    assert "Summary" not in made["vectors, 5"].messages[0]["content"]
    assert BUDGET == 500


def test_the_policies_prune_equally_many_but_not_the_same():
    with ConversationMemory.open(":memory:", encoder=HashedWords()) as memory:
        for turn in range(30):
            memory.add_turn(f"The road number {turn} runs to the sea.", "I see.")
        used = {hit.number for hit in memory.search("road number 3", 8)}
        gone = {policy: kept_by(memory, policy, np.random.default_rng(0)) for policy in POLICIES}
    assert {len(numbers) for numbers in gone.values()} == {18}
    assert len(set(gone.values())) == 4
    assert not used & gone["intended"]
    assert used <= gone["as printed"]


@pytest.fixture
def short(monkeypatch):
    plain = dialogue(1000, 0)
    facts = [fact for fact in plain.facts if fact.turn <= 30][:6]
    small = hema.Dialogue(plain.turns[:60], facts, {20: ["python", "object"], 60: ["python", "values"]})
    monkeypatch.setattr(hema, "dialogue", lambda seed, number: small)
    monkeypatch.setattr(hema, "ASKED_AGAIN", 3)
    monkeypatch.setattr(hema, "READ", 2)
    monkeypatch.setattr(hema, "BUDGET", 1200)
    monkeypatch.setattr(hema, "sentence_encoder", HashedArrays)


def test_a_dialogue_gives_every_figure(short):
    found = hema.tried(1000, 0, reciting(), quiet())
    assert set(found) == {*METHODS, *POLICIES, "forgetting", "keeping all"}
    assert all(0 <= value <= 1 for own in found.values() for value in own.values())
    assert found["keeping all"]["all facts"] == 1
    assert found["vectors, 20"]["in context"] > found["no memory"]["in context"]


def test_the_verdict_follows_from_the_figures():
    two = np.array([0.5, 0.5])
    good = {name: {"in context": two + 0.3, "gist": two, "said": two} for name in METHODS}
    good["no memory"] = {"in context": two - 0.4, "gist": two, "said": two - 0.2}
    good["summary only"] = {"in context": two - 0.3, "gist": two}
    good["HEMA, 5"]["gist"] = two + 0.1
    good |= {policy: {"facts in use": two, "all facts": two} for policy in POLICIES}
    good["intended"] = {"facts in use": two + 0.2, "all facts": two}
    good |= {"forgetting": {"all facts": two}, "keeping all": {"all facts": two + 0.01}}
    assert judge(good).verdict == "holds"
    assert len(judge(good).rows) == len(good)
    worse = {**good, "forgetting": {"all facts": two - 0.1}}
    assert judge(worse).verdict == "does not hold"
    mixed = {**good, "random": {"facts in use": np.array([0.5, 0.9]), "all facts": two}}
    assert judge(mixed).verdict == "inconclusive"
