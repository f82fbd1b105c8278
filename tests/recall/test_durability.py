"""What a store promises when processes are killed, share it, fill the disk, or want something gone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import FORMAT
from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords, left_of, turns, unit

TESTS = Path(__file__).parents[1]
START = """
import os, sys, time
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import FORMAT
from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords, turns, unit

def say(text):
    print(text, flush=True)

memory = ConversationMemory.open(sys.argv[1], encoder=HashedWords(), cadence=7, fraction=0.1)
"""
SECRET = "The launch code of xq7vault is Zanzibar-4471-omicron, whispered Quillonde."


def other(program: str, place: Path | str, **options: object) -> subprocess.Popen[str]:
    """Another process with the store open as `memory`."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", START + program, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **options,  # type: ignore[call-overload]
    )


def again(place: Path | str, **settings: object) -> ConversationMemory:
    return ConversationMemory.open(str(place), encoder=HashedWords(), **settings)  # type: ignore[arg-type]


# --- killed ----------------------------------------------------------------------------------------------------------


def test_what_was_added_survives_a_kill_in_the_midst_of_adding(tmp_path):
    program = "for i in range(10**6): say(memory.add(Record(text=f'memory number {i}')))"
    process = other(program, tmp_path / "memory.db")
    told = [process.stdout.readline().strip() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read().split()
    process.wait()
    with again(tmp_path / "memory.db") as memory:
        kept = {item.identity: item.text for item in memory.items.all()}
        assert set(told) <= set(kept)
        assert len(kept) <= len(told) + 1  # at most the one that had not returned
        assert [kept[identity] for identity in told] == [f"memory number {i}" for i in range(len(told))]
        assert len(memory.search("memory number 3", 1000, touch=False)) == len(kept)
        assert len(memory.search("memory", 1000, ranking="words", touch=False)) == len(kept)
        assert memory._open.engine.problems() == []


def test_a_conversation_survives_a_kill_with_its_summary_and_its_turns_in_step(tmp_path):
    program = """
for user, reply in turns(10**5):
    memory.add_turn(user, reply)
    say(len(memory.summary))
"""
    process = other(program, tmp_path / "memory.db")
    for _ in range(20):  # two prunings
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with again(tmp_path / "memory.db") as memory:
        turn = memory.items.state.turn
        assert turn >= 20
        assert [s.turn for s in memory.items.summaries() if s.kind == "running"] == list(range(1, turn + 1))
        spoken = [item for item in memory.items.all("all") if item.role == "user"]
        assert [item.text for item in spoken] == [user for user, _ in turns(turn)]
        assert memory._open.engine.problems() == []


@pytest.mark.parametrize("step", ["INSERT INTO words (words)", "VACUUM", "PRAGMA wal_checkpoint"])
def test_a_kill_between_a_removal_and_its_scrubbing_is_made_good(tmp_path, step):
    place = tmp_path / "memory.db"
    with again(place) as memory:
        memory.items.add([Record(text=f"filler text number {i}") for i in range(50)])
        identity = memory.add(Record(text=SECRET))
    program = f"""
engine, plain = memory._open.engine, memory._open.engine.all
def stopping(sql, arguments=()):
    if sql.startswith({step!r}):
        os.kill(os.getpid(), 9)
    return plain(sql, arguments)
engine.all = stopping
memory.forget({identity!r})
"""
    assert other(program, place).wait() == -signal.SIGKILL
    assert left_of(SECRET, tmp_path)  # it had not returned
    with again(place, must_exist=True) as memory:
        assert not left_of(SECRET, tmp_path)
        assert len(memory.items.all("all")) == 50
        assert memory._open.engine.problems() == []


# --- forgotten -------------------------------------------------------------------------------------------------------


def test_a_forgotten_text_leaves_no_bytes_in_any_file(tmp_path):
    place = tmp_path / "memory.db"
    bystander = other("say(len(memory.search('x', 5))); sys.stdin.readline()", place)
    bystander.stdout.readline()
    with again(place) as memory:
        for user, reply in turns(60):
            memory.add_turn(user, reply)
        first = memory.add(Record(prompt="What is the code?", answer=SECRET), metadata={"who": "Quillonde-Ferrant"})
        memory.update(first, Record(text=SECRET + " Twice."))
        memory.update(first, Record(text="Nothing here any more."))  # the history still holds both
        second = memory.items.supersede(first, Record(text=SECRET.replace("4471", "4472")))
        near = memory.add(Record(text=SECRET.replace("whispered", "whispering")))
        memory.add_turn(SECRET, "Understood, Zanzibar-4471-omicron.")
        memory.add_turn("Say it again.", f"As you said: {SECRET}")
        for user, reply in turns(40):
            memory.add_turn(user, reply)
        long = memory.add(Record(text=" ".join(f"zq{i}marker" for i in range(3000))))  # overflow pages
        assert left_of(SECRET, tmp_path)
        request = memory.items.chosen(containing="xq7vault") | memory.items.chosen(containing="omicron")
        assert {second, near} <= set(request)
        assert first not in request  # its text is clean; only its history is not
        memory.items.forget({**request, first: "its history", long: "long"})
        assert left_of(SECRET, tmp_path) == {}
        assert left_of("Quillonde-Ferrant zq17marker zq2999marker", tmp_path) == {}
        assert "Zanzibar" not in memory.summary
        assert len(memory.items.all("all")) == 2 * 60 + 2 * 40 + 1
        assert memory.search("launch code Zanzibar", 300, ranking="words") == []
        assert {c.event for c in memory.history(first)} == {"added", "updated", "superseded", "forgotten"}
        assert all(change.before is None for change in memory.history(first))
        assert memory._open.engine.problems() == []
    bystander.communicate("go\n")
    assert left_of(SECRET, tmp_path) == {}


def test_overwriting_what_is_deleted_is_not_enough_which_is_why_the_file_is_rebuilt(tmp_path):
    """What SQLite does with rows that it moves between pages; `scrub` is stopped at each of its steps above."""
    import sqlite3

    left = {"overwritten": 0, "rebuilt": 0}
    for seed in range(4):
        draw, place, kept, gone = random.Random(seed), tmp_path / f"{seed}.db", {}, []
        with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("CREATE TABLE said (number INTEGER PRIMARY KEY, text TEXT)")
            connection.execute("CREATE INDEX by_text ON said (text)")
            connection.execute("BEGIN")
            for step in range(1500):
                if kept and draw.random() < 0.4:
                    number = draw.choice(list(kept))
                    gone.append(kept.pop(number))
                    connection.execute("DELETE FROM said WHERE number = ?", (number,))
                else:
                    number, text = draw.randrange(10**9), f"SECRET_{step}_" + "ab" * draw.choice([1, 10, 60, 300, 900])
                    kept[number] = text
                    connection.execute("INSERT INTO said VALUES (?, ?)", (number, text))
            connection.execute("COMMIT")
            heads = [text[: text.rindex("_") + 1].encode() for text in gone]
            left["overwritten"] += sum(head in place.read_bytes() for head in heads)
            connection.execute("VACUUM")
            left["rebuilt"] += sum(head in place.read_bytes() for head in heads)
    assert left["overwritten"] > 0
    assert left["rebuilt"] == 0


def test_a_user_who_is_forgotten_leaves_not_even_a_name(tmp_path):
    place = tmp_path / "memory.db"
    with again(place) as keeper:
        keeper.add(Record(text="mine stays"))
        with again(place, user="Quillonde-Ferrant") as memory:
            memory.add_turn(SECRET, "Noted.")
            memory.update(memory.items.all()[0].identity, Record(text="changed"))
            assert left_of("Quillonde-Ferrant", tmp_path)
            assert memory.items.forget_all() == 2
            assert left_of(SECRET + " Quillonde-Ferrant", tmp_path) == {}
            assert memory.history() == []
            assert memory.summary == ""
        assert [item.text for item in keeper.items.all()] == ["mine stays"]


def test_a_summary_that_is_not_made_of_sentences_goes_back_to_before(tmp_path):
    class Echo:
        extractive = False

        def __call__(self, summary: str, said: str) -> str:
            return f"{summary} They spoke of {said.split()[-1]}".strip()

    with again(tmp_path / "memory.db", summariser=Echo()) as memory:
        memory.add_turn("first apples")
        (identity,) = memory.add_turn("then xq7vault")
        memory.add_turn("later pears")
        assert "xq7vault" in memory.summary
        assert memory.forget(identity).summaries == 2
        assert memory.summary == "They spoke of apples"
        assert left_of("xq7vault", tmp_path) == {}


def test_forgetting_waits_for_a_reader_and_says_so_when_it_waits_in_vain(tmp_path, monkeypatch):
    place = tmp_path / "memory.db"
    with again(place) as memory:
        identity = memory.add(Record(text=SECRET))
        reading = other(
            "c = memory._open.engine._connection; c.execute('BEGIN'); c.execute('SELECT * FROM items').fetchone()\n"
            "say('reading'); sys.stdin.readline(); c.execute('COMMIT'); say('done'); sys.stdin.readline()",
            place,
        )
        reading.stdout.readline()
        memory._open.engine.all("PRAGMA busy_timeout = 300")
        with pytest.raises(PalimpsestError, match="another process still reads the log"):
            memory.forget(identity)
        assert memory.search("launch code", 5) == []
        assert memory._open.engine.problems() == ["bytes of removed memories may be left in the file"]
        reading.stdin.write("go\n")
        reading.stdin.flush()
        reading.stdout.readline()
        memory._open.engine.scrub()
        assert left_of(SECRET, tmp_path) == {}
        reading.communicate("go\n")


# --- shared ----------------------------------------------------------------------------------------------------------


def test_two_processes_write_at_once_and_both_see_everything(tmp_path):
    place = tmp_path / "memory.db"
    program = """
say('ready'); name = sys.stdin.readline().strip()
for i in range(60):
    identity = memory.add(Record(text=f'{name} wrote note {i}'))
    if i % 10 == 9:
        memory.forget(identity)
    found = memory.search(f'{name} wrote note {i}', 500, touch=False)
    assert any(hit.identity == identity for hit in found) is (i % 10 != 9), (i, identity)
say('done'); sys.stdin.readline()
say(' '.join(hit.identity for hit in memory.search('wrote note', 500, touch=False)))
say(' '.join(hit.identity for hit in memory.search('wrote note', 500, ranking='words', touch=False)))
"""
    writers = [other(program, place) for _ in range(2)]
    for name, writer in zip(("ada", "ben"), writers, strict=True):
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.write(f"{name}\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.stdout.readline() == "done\n"
    told = [writer.communicate("go\n")[0].splitlines() for writer in writers]
    with again(place) as memory:
        expected = {item.identity for item in memory.items.all()}
        assert len(expected) == 2 * 54
        assert [set(line.split()) for lines in told for line in lines] == [expected] * 4
        assert len({item.turn for item in memory.items.all()}) == 108  # no two in the same turn


def test_two_processes_share_one_conversation(tmp_path):
    place = tmp_path / "memory.db"
    program = "for user, reply in turns(25): memory.add_turn(user, reply)\nsay('done')"
    writers = [other(program, place) for _ in range(2)]
    assert [writer.communicate()[0] for writer in writers] == ["done\n"] * 2
    with again(place) as memory:
        assert memory.items.state.turn == 50
        assert [s.turn for s in memory.items.summaries() if s.kind == "running"] == list(range(1, 51))
        assert [s.turn for s in memory.items.summaries() if s.kind == "archived"] == [7, 14, 21, 28, 35, 42, 49]


def test_a_summary_is_made_again_where_another_turn_came_in_between(tmp_path, monkeypatch):
    place = tmp_path / "memory.db"
    with again(place) as one, again(place) as two:
        plain, calls = one.summariser, []

        class Slow:
            extractive = True

            def __call__(self, summary, said):
                calls.append(summary)
                if len(calls) == 1:
                    two.add_turn("The other one was quicker.")
                return plain(summary, said)

        one.__dict__["summariser"] = Slow()
        one.add_turn("I was slow.")
        assert calls == ["", "The other one was quicker."]
        assert one.summary == "The other one was quicker.\nI was slow."
        assert [item.turn for item in one.items.all()] == [1, 2]


def test_a_writer_that_never_ends_is_named(tmp_path):
    place = tmp_path / "memory.db"
    with again(place) as memory, again(place) as blocking:
        memory._open.engine.all("PRAGMA busy_timeout = 100")
        with (
            blocking._open.engine.transaction(),
            pytest.raises(PalimpsestError, match="another process has been writing"),
        ):
            memory.add(Record(text="x"))
        memory.add(Record(text="now it works"))


# --- full ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path):
    place = tmp_path / "memory.db"
    with again(place) as memory:
        kept = memory.items.add([Record(text=f"kept {i}") for i in range(20)])
        pages = memory._open.engine.all("PRAGMA page_count")[0][0]
        memory._open.engine.all(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(PalimpsestError, match=r"the disk is full .*Nothing of this was stored"):
            memory.items.add([Record(text=f"too much {i} " + "word " * 500) for i in range(200)])
        assert [item.identity for item in memory.items.all()] == kept
        assert memory.search("too much", 5, ranking="words") == []
        assert len(memory.search("kept", 50, touch=False)) == 20
        memory._open.engine.all("PRAGMA max_page_count = 1000000")
        memory.add(Record(text="room again"))
        assert memory._open.engine.problems() == []


def test_a_limit_on_the_size_of_files_loses_nothing(tmp_path):
    place = tmp_path / "memory.db"
    program = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))
stored = []
try:
    while True:
        stored.append(memory.add(Record(text='a memory of some length ' * 20 + str(len(stored)))))
except PalimpsestError as error:
    say(error)
say(' '.join(stored))
say(len(memory.search('a memory', 10**4, touch=False)))
"""
    lines = other(program, place).communicate()[0].splitlines()
    assert "the disk is full or failing" in lines[0]
    assert "Nothing of this was stored" in lines[0]
    stored = lines[1].split()
    assert int(lines[2]) == len(stored) > 5
    with again(place) as memory:
        assert [item.identity for item in memory.items.all()] == stored
        assert memory._open.engine.problems() == []


# --- not ours, newer, cut short --------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A store with 40 memories, closed."""
    with again(tmp_path / "memory.db") as memory:
        memory.items.add([Record(text=f"memory number {i}") for i in range(40)])
    return tmp_path / "memory.db"


def refused(place: Path, match: str, **how: object) -> None:
    """Opening raises, and no byte of the folder changes."""
    before = {path: path.read_bytes() for path in place.parent.iterdir() if path.is_file()}
    with pytest.raises(PalimpsestError, match=match):
        again(place, **how)
    assert {path: path.read_bytes() for path in place.parent.iterdir() if path.is_file()} == before


def test_a_file_of_something_else_is_refused(tmp_path):
    import sqlite3

    (tmp_path / "notes.txt").write_text("my notes, nothing else\n" * 10)
    refused(tmp_path / "notes.txt", "is not a store of palimpsest")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    refused(tmp_path / "other.db", "an SQLite file of another program")
    (tmp_path / "empty.db").touch()
    refused(tmp_path / "empty.db", "is empty; a store never is")
    refused(tmp_path, "is a folder, expected the file of a store")
    with pytest.raises(PalimpsestError, match="cannot be opened"):
        again(tmp_path / "no" / "folder" / "x.db")
    refused(tmp_path / "not-there.db", "there is no store", must_exist=True)
    refused(tmp_path / "not-there.db", "there is no store", read_only=True)


def test_a_newer_format_is_refused(made):
    content = bytearray(made.read_bytes())
    content[63] = FORMAT + 1  # the big-endian user_version
    made.write_bytes(content)
    refused(made, "has format 2, this version reads 1. Nothing was changed; update palimpsest")


@pytest.mark.parametrize("left", [7, 50, 99, 100, 4096, 0.5, -1])
def test_a_file_that_was_cut_short_is_refused(made, left):
    whole = made.read_bytes()
    size = int(len(whole) * left) if isinstance(left, float) else left % len(whole)
    made.write_bytes(whole[:size])
    refused(made, "cut short|not a store")
    made.write_bytes(whole)
    with again(made) as memory:
        assert len(memory.items.all()) == 40


def test_damage_inside_is_told_and_nothing_is_written(made):
    content = bytearray(made.read_bytes())
    page = 16384
    for start in range(page, len(content), page):
        content[start : start + 200] = b"\xff" * 200
    made.write_bytes(content)
    refused(made, "is damaged")


def test_read_only_finds_and_refuses_to_write(made):
    before = made.read_bytes()
    with again(made, read_only=True) as memory:
        assert memory.search("memory number 7", 3)[0].text == "memory number 7"
        assert memory.items.state.turn == 40
        for act in (lambda: memory.add(Record(text="x")), lambda: memory.forget("1"), lambda: memory.add_turn("x")):
            with pytest.raises(PalimpsestError, match=r"may only be read|there is no memory"):
                act()
    assert made.read_bytes() == before


def test_another_encoder_is_refused(made):
    with pytest.raises(PalimpsestError, match="was made with the encoder hashed-words, not other-words"):
        ConversationMemory.open(str(made), encoder=HashedWords(name="other-words"))
    with pytest.raises(PalimpsestError, match=r"makes vectors of 64 numbers, .* keeps 256"):
        ConversationMemory.open(str(made), encoder=HashedWords(width=64)).search("x")

    class Shifted(HashedWords):
        def encode(self, texts):
            return super().encode([text[::-1] for text in texts])

    with pytest.raises(PalimpsestError, match=r"gives other vectors than when .* \(cosine 0"):
        ConversationMemory.open(str(made), encoder=Shifted()).search("x")


def test_a_new_store_is_whole_or_not_there(tmp_path):
    place = tmp_path / "memory.db"
    started = [other("say(memory.add(Record(text='x' + sys.stdin.readline())))", place) for _ in range(4)]
    found = [process.communicate(f"{i}\n")[0].strip() for i, process in enumerate(started)]
    assert len(set(found)) == 4
    with again(place) as memory:
        assert {item.identity for item in memory.items.all()} == set(found)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.db"]


# --- speed that a promise must not cost ------------------------------------------------------------------------------


def test_search_reads_only_what_is_new(tmp_path):
    with again(tmp_path / "memory.db") as memory:
        memory.items.add([Record(text=f"text {i}") for i in range(3000)], vectors=unit(3000))
        memory.search("", 5, vector=unit(1)[0], touch=False)
        read = []
        engine, plain = memory._open.engine, memory._open.engine._index.put
        engine._index.put = lambda columns, vectors: (read.append(len(vectors)), plain(columns, vectors))
        memory.add(Record(text="one more"))
        memory.search("", 5, vector=unit(1)[0])
        memory.search("", 5, vector=unit(1)[0], touch=False)
        assert read == [1, 5]  # the new one; then the five that were touched
        with again(tmp_path / "memory.db") as other_one:
            other_one.items.forget({item.identity: "test" for item in memory.items.all()[:7]})
        memory.search("", 5, vector=unit(1)[0], touch=False)
        assert engine._index.size == 3001 - 7


def test_every_change_has_its_time_and_event(tmp_path):
    start = time.time()
    with again(tmp_path / "memory.db") as memory:
        identity = memory.add(Record(text="a"))
        memory.items.set(identity, pinned=True)
        memory.forget(identity, reason="Ada asked")
        changes = memory.history()
    assert [(c.event, c.reason) for c in changes] == [("added", ""), ("set", "pinned"), ("forgotten", "Ada asked")]
    assert all(start <= change.at <= time.time() for change in changes)
