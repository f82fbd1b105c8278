"""What is forgotten is gone from everything that was made of it, and what may be left is told."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall import postgres_store, sqlite_file
from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords, left_of, unit

LEFT = "bytes of removed memories may be left in the file"


class Retold:
    """A summariser that writes sentences of its own."""

    extractive = False

    def __call__(self, summary: str, said: str) -> str:
        return f"{summary} Somebody spoke of {said.split()[-1]}".strip()


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Somebody else reads the memories all the while."""
    if place.startswith("postgres"):
        import psycopg

        with psycopg.connect(place) as connection:
            connection.execute("SELECT * FROM palimpsest.items").fetchone()
            yield
    else:
        import sqlite3

        with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM items").fetchone()
            yield


# --- summaries -------------------------------------------------------------------------------------------------------


def test_what_a_memory_said_before_its_updates_leaves_the_summary_too(opened, tmp_path):
    memory = opened()
    (identity,) = memory.add_turn("My secret is zebrafish77.")
    memory.add_turn("It rains.")
    memory.update(identity, Record(prompt="What was the secret?", answer="Redacted."))
    memory.update(identity, Record(text="Redacted again."))
    memory.forget(identity)
    assert memory.summary == "It rains."
    assert left_of("zebrafish77", tmp_path) == {}


def test_a_summary_that_a_model_wrote_goes_whoever_forgets(opened, tmp_path):
    writer = opened(summariser=Retold())
    writer.add_turn("first apples")
    (identity,) = writer.add_turn("then xq7vault")
    memory = opened()
    memory.add_turn("Later pears.")  # picks its sentences out of what the model wrote
    assert "xq7vault" in memory.summary
    assert memory.forget(identity).summaries == 2
    assert memory.summary == "Somebody spoke of apples"
    assert left_of("xq7vault", tmp_path) == {}


def test_a_summary_of_sentences_is_cut_whatever_others_in_the_store_use(opened):
    opened(user="ben", summariser=Retold()).add_turn("first apples")
    memory = opened()
    memory.add_turn("Ada lives in Lyon.")
    (identity,) = memory.add_turn("The code is 99.")
    memory.forget(identity)
    assert memory.summary == "Ada lives in Lyon."


def test_a_scope_that_is_forgotten_leaves_no_note_of_who_wrote_its_summaries(opened):
    memory = opened(summariser=Retold(), cadence=1)
    before = memory._open.engine.all("SELECT COUNT(*) FROM meta")
    memory.add_turn("first apples")
    memory.items.forget_all()
    kept = memory._open.engine.all("SELECT COUNT(*) FROM meta WHERE name <> 'probe'")
    assert kept == before


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_request_finds_every_memory_that_says_the_same(opened):
    memory = opened(repeated="keep")
    ids = memory.items.add([Record(text="The same text.")] * 150)
    assert set(memory.items.chosen(like=ids[0])) == set(ids)


def test_a_request_finds_the_same_where_search_is_quick(opened):
    memory, vectors = opened(), unit(2500)
    ids = memory.items.add([Record(text=f"text {i}") for i in range(2500)], vectors=vectors)
    memory._open.engine.accelerate(0)
    expected = {ids[i] for i in np.flatnonzero(vectors @ vectors[7] >= 0.1)}
    assert len(expected) > 100
    assert set(memory.items.chosen(like=ids[7], alike=0.1)) == expected


def test_a_filter_that_everything_satisfies_is_refused(opened):
    memory = opened()
    memory.add(Record(text="stays"))
    with pytest.raises(PalimpsestError, match="the filter is empty"):
        memory.items.chosen(where={})


# --- scrubbing -------------------------------------------------------------------------------------------------------


def test_a_removal_that_cannot_be_scrubbed_yet_is_told_and_made_good_later(opened, place, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "WAIT", 0.3)
    monkeypatch.setattr(postgres_store, "WAIT", 300)
    memory = opened()
    kept, gone = memory.items.add([Record(text="kept"), Record(text="the code zebrafish77")])
    with reading(place):
        with pytest.raises(PalimpsestError, match="removed, but not yet scrubbed"):
            memory.forget(gone)
        assert memory._open.engine.problems() == [LEFT]
        with pytest.warns(UserWarning, match="removed, but not yet scrubbed"):
            late = opened()
        assert [item.identity for item in late.items.all()] == [kept]
        late.add(Record(text="goes on"))
    assert opened()._open.engine.problems() == []
    assert left_of("zebrafish77", tmp_path) == {}


def test_a_full_disk_does_not_deny_a_removal_nor_shut_the_store(tmp_path):
    place = tmp_path / "memory.db"
    with ConversationMemory.open(str(place), encoder=HashedWords()) as memory:
        memory.items.add([Record(text=f"text {i} " + "x" * 300) for i in range(1500)])
    limited = """
import resource, signal, sys, warnings
from palimpsest.errors import PalimpsestError
from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
warnings.simplefilter("error")
"""
    forgetting = """
memory = ConversationMemory.open(sys.argv[1], encoder=HashedWords())
try:
    memory.forget("7")
except PalimpsestError as error:
    print(error, flush=True)
"""
    opening = """
warnings.simplefilter("always")
memory = ConversationMemory.open(sys.argv[1], encoder=HashedWords())
print(len(memory.items.all()), len(memory.search("text 5", 3, touch=False)), memory._open.engine.problems(), flush=True)
"""
    told = run_with_tests(limited + forgetting, place)
    assert "the disk is full or failing" not in told
    assert "removed, but not yet scrubbed" in told
    assert run_with_tests(limited + opening, place) == f"1499 3 {[LEFT]}\n"
    with ConversationMemory.open(str(place), encoder=HashedWords()) as memory:
        assert memory._open.engine.problems() == []


def run_with_tests(program: str, place: object) -> str:
    """What another process prints that finds the helpers of the tests."""
    command = [sys.executable, "-c", "import sys\n" + f"sys.path[:0] = {sys.path!r}\n" + program, str(place)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
