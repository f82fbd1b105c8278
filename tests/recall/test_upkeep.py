"""Turns, pruning, opening, re-embedding and import: what keeps a store in order over time."""

from __future__ import annotations

import errno
import json
import os
import threading
import time

import numpy as np
import pytest

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall import sqlite_file, vector_index
from palimpsest.recall.hema import ConversationMemory
from palimpsest.recall.memories import Sight
from palimpsest.recall.portable import exported, imported
from palimpsest.recall.storage import Storage
from palimpsest.recall.vector_index import COLUMNS, VectorIndex
from remembering import HashedWords, turns, unit

LONG = "One two three four five six seven. Eight nine ten eleven twelve thirteen fourteen."


def archived(memory: ConversationMemory) -> list[int]:
    return [summary.turn for summary in memory.items.summaries() if summary.kind == "archived"]


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_notes_between_the_turns_do_not_put_off_condensing_and_pruning(opened):
    memory = opened(cadence=10, fraction=0.1)
    for i in range(12):
        memory.add_turn(f"turn {i}")
        memory.add(Record(text=f"note {i}"))
    assert archived(memory) == [11, 21]
    assert sum(item.faded for item in memory.items.all("all")) == 3  # of 11, then 2.1 of 20 with 0.1 carried


def test_a_pruning_that_a_kill_prevented_comes_with_the_next_turn(opened, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    memory = opened(cadence=3, fraction=0.5)
    memory.add_turn("one")
    memory.add_turn("two")
    with monkeypatch.context() as killed:
        killed.setattr(Storage, "fade", stopped)
        with pytest.raises(KeyboardInterrupt):
            memory.add_turn("three")
    memory = opened(cadence=3, fraction=0.5)
    assert sum(item.faded for item in memory.items.all("all")) == 0
    memory.add_turn("four")
    memory.add_turn("five")
    assert sum(item.faded for item in memory.items.all("all")) == 2
    assert archived(memory) == [3]


def test_two_that_prune_at_once_both_count(opened):
    one, two = opened(fraction=0.3), opened(fraction=0.3)
    one.add(Record(text="Ada lives in Lyon."))
    other, plain = threading.Thread(target=two.prune), one._open.engine.ages

    def meanwhile(sight):
        other.start()
        time.sleep(0.3)
        return plain(sight)

    one._open.engine.ages = meanwhile
    one.prune()
    other.join()
    assert one.items.state.carry == pytest.approx(0.6)


def test_a_memory_of_which_a_part_has_faded_is_restored_and_not_stored_twice(opened):
    memory = opened(chunk_tokens=8, fraction=0.5)
    identity = memory.add(Record(text=LONG))
    assert set(memory.prune()) == {identity}
    assert len(memory.search("One two Eight nine", 5, touch=False)) == 1
    assert memory.add(Record(text=LONG)) == identity
    memory.items.restore(identity)
    assert len(memory.search("One two Eight nine", 5, touch=False)) == 2
    with pytest.raises(PalimpsestError, match="has not faded"):
        memory.items.restore(identity)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_several_that_open_a_new_store_on_a_server_all_get_it(server):
    import psycopg

    failed: list[BaseException] = []
    for _ in range(8):
        address = server()
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("DROP EXTENSION IF EXISTS vector CASCADE")
        gate = threading.Barrier(4)

        def go(address=address, gate=gate):
            gate.wait()
            try:
                ConversationMemory.open(address, encoder=HashedWords()).close()
            except BaseException as error:
                failed.append(error)

        openers = [threading.Thread(target=go) for _ in range(4)]
        for opener in openers:
            opener.start()
        for opener in openers:
            opener.join()
    assert failed == []


def test_a_store_that_another_made_meanwhile_stays_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    place = tmp_path / "memory.db"
    with ConversationMemory.open(str(place), encoder=HashedWords()) as memory:
        memory.add(Record(text="precious"))
    sqlite_file.make(place, "hashed-words", 256)  # what the slower one does
    with ConversationMemory.open(str(place), encoder=HashedWords()) as memory:
        assert [item.text for item in memory.items.all()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["memory.db"]


# --- re-embedding ----------------------------------------------------------------------------------------------------


def test_a_failed_re_embedding_leaves_the_store_as_it_was(opened):
    class Failing(HashedWords):
        def encode(self, texts):
            raise RuntimeError("out of memory")

    memory = opened()
    identity = memory.add(Record(text="The boat is blue."))
    with pytest.raises(RuntimeError, match="out of memory"):
        memory._open.reembed(Failing(width=64, name="narrow"))
    other = memory.add(Record(text="The house is red."))
    for diversity in (0.0, 0.5):
        found = [hit.identity for hit in memory.search("The boat is blue.", 2, diversity=diversity)]
        assert found == [identity, other]
    assert memory._open.engine.problems() == []


def test_re_embedding_with_the_same_name_is_told_to_others(opened):
    memory, other = opened(), opened()
    memory.items.add([Record(text=f"text {i}") for i in range(60)])
    memory._open.engine.accelerate(0)
    other.search("text 3", 1)
    assert memory._open.reembed(HashedWords()) == 60
    assert memory.search("text 3", 1)[0].text == "text 3"
    for act in (lambda: other.search("text 3"), lambda: other.add(Record(text="late"))):
        with pytest.raises(PalimpsestError, match="was re-embedded with hashed-words meanwhile"):
            act()
    assert opened().search("text 3", 1)[0].text == "text 3"


def test_a_chunk_that_is_put_again_with_another_vector_is_found_by_it(monkeypatch):
    monkeypatch.setattr(vector_index, "ROUNDED_FROM", 100)
    vectors, index = unit(400, 32), VectorIndex(32)
    columns = {name: np.zeros(400, kind) for name, kind in COLUMNS.items()}
    columns |= {"number": np.arange(400), "ended": np.full(400, np.inf), "expires": np.full(400, np.inf)}
    index.put(columns, vectors)
    everything = index.visible(Sight(), None)
    assert index.nearest(vectors[3], 1, everything)[0][0] == 3
    index.put(columns, -vectors)
    assert index.nearest(-vectors[3], 1, everything)[0][0] == 3


# --- in and out ------------------------------------------------------------------------------------------------------


def test_an_import_does_not_move_the_clock_beyond_its_turns(opened):
    memory = opened()
    for user, reply in turns(10):
        memory.add_turn(user, reply)
    with ConversationMemory.open(":memory:", encoder=HashedWords()) as other:
        imported(other.items, exported(memory.items))
        assert other.items.state.turn == memory.items.state.turn == 10
        imported(other.items, [json.dumps({"text": "without a turn"})])
        assert other.items.state.turn == 11


def test_a_superseded_memory_keeps_its_successor_when_it_is_corrected(opened):
    memory = opened()
    old = memory.add(Record(text="Ada lives in Lion."), happened=100.0)
    new = memory.items.supersede(old, Record(text="Ada lives in Porto."), happened=200.0)
    memory.update(old, Record(text="Ada lives in Lyon."))
    assert (memory.items.get(old).ended, memory.items.get(old).successor) == (200.0, new)
    memory.items.undo(old)
    assert memory.items.get(old).successor == new


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.add(Record(text="half \ud800 a pair")),
        lambda m: m.add(Record(text="x", subject="half \ud800 a pair")),
        lambda m: m.add(Record(text="x"), metadata={"a": "half \ud800 a pair"}),
        lambda m: m.add_turn("half \ud800 a pair"),
        lambda m: m.search("half \ud800 a pair"),
        lambda m: m.search("half \ud800 a pair", ranking="words"),
        lambda m: m.forget(m.add(Record(text="x")), reason="half \ud800 a pair"),
        lambda m: ConversationMemory.open(m.store, encoder=HashedWords(), user="half \ud800 a pair").items,
    ],
)
def test_half_a_character_is_named(opened, act):
    memory = opened()
    with pytest.raises(PalimpsestError, match="half of a surrogate pair"):
        act(memory)
    memory.add(Record(text="goes on"))
    assert memory._open.engine.problems() == []
