from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from conftest import build_tokenizer
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.hema import ConversationMemory
from palimpsest.system import create, facts_of
from remembering import HashedWords, turns, unit


def talked(memory: ConversationMemory, count: int, start: int = 0) -> ConversationMemory:
    for user, reply in turns(start + count)[start:]:
        memory.add_turn(user, reply)
    return memory


def told(memory: ConversationMemory) -> list[object]:
    """Everything a store holds but the times of the clock."""
    hidden = {"written": 0.0, "happened": 0.0}
    items = [dataclasses.replace(item, **hidden) for item in memory.items.all("all")]
    return [items, memory.items.summaries(), memory.items.state]


def test_it_is_listed_and_made_by_name():
    assert facts_of("hema").verb == "recall"
    assert type(create("hema", k=3)) is ConversationMemory


def test_a_turn_is_stored_word_for_word_and_in_the_summary(opened):
    memory = opened()
    user, reply = memory.add_turn("I am Ada and I live in Lyon.", "Hello Ada.")
    assert [(item.role, item.text, item.turn) for item in memory.items.all()] == [
        ("user", "I am Ada and I live in Lyon.", 1),
        ("assistant", "Hello Ada.", 1),
    ]
    assert memory.summary == "I am Ada and I live in Lyon.\nHello Ada."
    assert memory.items.get(user).role == "user"
    assert memory.items.get(reply).role == "assistant"
    assert len(memory.add_turn("No answer to this.")) == 1


def test_every_hundredth_turn_archives_condenses_and_lets_fade(opened):
    memory = talked(opened(cadence=10, fraction=0.1), 30)
    kinds = {kind: [s.turn for s in memory.items.summaries() if s.kind == kind] for kind in ("archived", "overall")}
    assert kinds == {"archived": [10, 20, 30], "overall": [10, 20, 30]}
    overall = [s for s in memory.items.summaries() if s.kind == "overall"]
    assert memory.summary == overall[-1].text
    archived = "\n".join(s.text for s in memory.items.summaries() if s.kind == "archived")
    assert all(line in archived for line in overall[-1].text.splitlines())  # condensed from the archived ones alone
    following = talked(memory, 1, start=30).summary
    assert set(following.splitlines()) <= set(overall[-1].text.splitlines()) | set(turns(31)[30])
    # 2 of 20 fade, then 3.8 of 38, 5.6 + 0.8 carried of 55: 2, 3, 6
    events = [change.event for change in memory.history()]
    assert events.count("faded") == 2 + 3 + 6
    assert len(memory.items.all("all")) - len(memory.items.all()) == 11


def test_what_was_used_lately_outlives_what_is_newer(opened):
    memory = talked(opened(fraction=0.3), 20)
    used = [hit.identity for hit in memory.search("painted the garden", 3)]
    untouched = [hit.identity for hit in memory.search("theatre", 3, touch=False)]
    planned = memory.prune(dry_run=True)
    assert len(planned) == 12
    assert not set(used) & set(planned)
    assert memory.prune(dry_run=True) == planned  # nothing happened
    assert memory.prune() == planned
    assert all("never retrieved" in reason for reason in planned.values())
    assert {item.identity for item in memory.items.all("all")} - {i.identity for i in memory.items.all()} == set(
        planned
    )
    first = next(iter(planned))
    assert first not in [hit.identity for hit in memory.search(memory.items.get(first).text, 50)]
    memory.items.restore(first)
    assert first in [hit.identity for hit in memory.search(memory.items.get(first).text, 50)]
    assert untouched


def test_as_printed_the_used_ones_go_first(opened):
    memory = talked(opened(fraction=0.1, formula="as-printed"), 20)
    used = {hit.identity for hit in memory.search("painted the garden", 4)}
    assert set(memory.prune()) == used


def test_hot_facts_survive_by_the_intended_sign_only():
    """The card's check: 400 turns, 20 facts asked every 50 turns, 30 % pruned."""

    def kept(**how):
        with ConversationMemory.open(":memory:", encoder=HashedWords(), fraction=0.3, cadence=10**6, **how) as memory:
            vectors = unit(400)
            ids = memory.items.add([Record(text=f"turn {i}") for i in range(400)], vectors=vectors)
            for turn in (350, 400):
                for hot in range(20):
                    numbers = memory.items.numbers([ids[hot]])
                    memory._open.storage.touch(numbers, turn)
            memory.prune()
            return sum(not memory.items.get(identity).faded for identity in ids[:20])

    assert kept() == 20
    assert kept(formula="as-printed") == 0
    assert kept(bonus=0.0) == 0


def test_pinned_memories_never_fade(opened):
    memory = opened(fraction=1.0)
    pinned = memory.add(Record(text="keep me"), pinned=True)
    memory.add(Record(text="not me"))
    assert pinned not in memory.prune()
    assert [item.identity for item in memory.items.all()] == [pinned]


def test_asking_twice_changes_what_fades_unless_not_touched(opened):
    memory = talked(opened(fraction=0.1), 10)
    before = memory.prune(dry_run=True)
    memory.search(memory.items.get(next(iter(before))).text, 1, touch=False)
    assert memory.prune(dry_run=True) == before
    memory.search(memory.items.get(next(iter(before))).text, 1)
    assert memory.prune(dry_run=True) != before


def test_the_prompt_keeps_to_its_budget_for_a_thousand_turns():
    words = build_tokenizer(chat=True)
    reader = Encoder(words, 4096)
    with ConversationMemory.open(":memory:", encoder=HashedWords(), budget=190) as memory:
        tight = 0
        for user, reply in turns(1000):
            prompt = memory.compile_prompt(user, words, system="You remember.")
            assert prompt.tokens == len(reader.conversation(prompt.messages)) <= 190
            tight += bool(prompt.dropped)
            memory.add_turn(user, reply)
        assert tight > 900
        assert len(prompt.kept) >= 2
        stored = memory.items.state.turn
    assert stored == 1000


def test_the_prompt_shows_the_last_turns_once_and_what_fits_of_the_rest(opened):
    memory, words = talked(opened(k=3), 12), build_tokenizer(chat=True)
    memory.add(Record(text="a note is no turn of the conversation"))
    prompt = memory.compile_prompt("Tell me about the garden.", words, touch=False)
    last = [text for turn in turns(12)[-2:] for text in turn]
    assert [message["content"] for message in prompt.messages[1:]] == [*last, "Tell me about the garden."]
    assert len(prompt.kept) == 3
    assert not {hit.text for hit in prompt.kept} & set(last)
    assert "Summary of the conversation so far" in prompt.messages[0]["content"]


def test_opened_again_it_goes_on_as_if_it_had_never_been_closed(opened):
    words = build_tokenizer(chat=True)
    first = talked(opened(cadence=10, fraction=0.1), 25)
    found = [(hit.identity, hit.score, hit.why) for hit in first.search("garden", 8, touch=False)]
    state, planned = told(first), first.prune(dry_run=True)
    prompt = first.compile_prompt("What about the garden?", words, touch=False)
    second = opened(cadence=10, fraction=0.1)
    assert told(second) == state
    assert [(hit.identity, hit.score, hit.why) for hit in second.search("garden", 8, touch=False)] == found
    assert second.prune(dry_run=True) == planned
    again = second.compile_prompt("What about the garden?", words, touch=False)
    assert (again.messages, again.tokens) == (prompt.messages, prompt.tokens)


def test_the_same_conversation_gives_the_same_state():
    states = []
    for _ in range(2):
        with ConversationMemory.open(":memory:", encoder=HashedWords(), cadence=10, fraction=0.1) as memory:
            for user, reply in turns(40):
                memory.search(user, 4)
                memory.add_turn(user, reply)
            states.append((told(memory), memory._open.engine._index.vectors.tobytes()))
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "hema: k is 0, expected at least 1"),
        ({"strength": -1.0}, "hema: strength is -1.0, expected at least 0"),
        ({"decay": -0.1}, "hema: decay is -0.1, expected at least 0"),
        ({"bonus": -0.5}, "hema: bonus is -0.5, expected at least 0"),
        ({"fraction": 1.1}, "hema: fraction is 1.1, expected at most 1"),
        ({"fraction": -0.1}, "hema: fraction is -0.1, expected at least 0"),
        ({"cadence": 0}, "hema: cadence is 0, expected at least 1"),
        ({"formula": "printed"}, "hema: formula is 'printed'. Did you mean \"as-printed\""),
        ({"budget": 0}, "hema: budget is 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(PalimpsestError, match=message):
        create("hema", **settings)


def test_wrong_turns_and_budgets_are_named(opened):
    memory = opened()
    with pytest.raises(PalimpsestError, match="the user's text is empty"):
        memory.add_turn("  \n", "reply")
    with pytest.raises(PalimpsestError, match="the budget is 3 tokens, but system text"):
        memory.compile_prompt("Who is there in the house now?", build_tokenizer(chat=True), budget=3)
    with pytest.raises(PalimpsestError, match="the scope's user is ' '"):
        opened(user=" ").add(Record(text="x"))
    with pytest.raises(PalimpsestError, match="the store has no name"):
        ConversationMemory.open(" ")
    assert memory.items.all("all") == []


def test_cells_are_found_in_the_file_again(tmp_path):
    place = str(tmp_path / "memory.db")
    vectors = unit(3000)
    with ConversationMemory.open(place, encoder=HashedWords()) as memory:
        memory.items.add([Record(text=f"text {i}") for i in range(3000)], vectors=vectors)
        exact = [hit.number for hit in memory.search("", 1, vector=vectors[7], touch=False)]
        memory._open.engine.accelerate(3000)
        memory.search("", 1, vector=vectors[7], touch=False)
        assert memory._open.engine._index.centres is None  # not more than that
        memory._open.engine.accelerate(1000)
        memory._open.engine.accelerate(1000)  # not again before there are twice as many
        added = memory.add(Record(text="late"), vector=-vectors[7])
        assert memory.search("", 1, vector=-vectors[7])[0].identity == added
        centres = memory._open.engine._index.centres
    with ConversationMemory.open(place, encoder=HashedWords()) as memory:
        assert [hit.number for hit in memory.search("", 1, vector=vectors[7], touch=False)] == exact
        index = memory._open.engine._index
        np.testing.assert_array_equal(index.centres, centres)
        assert (index["cell"] >= 0).all()
        assert memory._open.engine.all("SELECT value FROM counters WHERE name = 'centres'") == [(1,)]
