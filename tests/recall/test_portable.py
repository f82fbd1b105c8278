from __future__ import annotations

import json

import pytest

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.doctor import examined, near_pairs
from palimpsest.recall.hema import ConversationMemory
from palimpsest.recall.portable import exported, imported
from remembering import HashedWords, turns, unit


def test_an_import_gives_back_what_was_exported(opened):
    memory = opened(user="ada", run="one")
    for user, reply in turns(3):
        memory.add_turn(user, reply)
    old = memory.add(Record(prompt="Where?", answer="Lyon."), metadata={"a": [1]}, pinned=True, happened=5.0)
    memory.items.supersede(old, Record(text="Porto."), happened=9.0)
    lines = list(exported(memory.items))
    with ConversationMemory.open(":memory:", encoder=HashedWords(), user="ben") as other:
        other.add(Record(text="already here"))
        identities = imported(other.items, lines)
        again = [json.loads(line) for line in exported(other.items)][1:]
    assert [row["identity"] for row in again] == identities
    moved = {json.loads(line)["identity"]: new for line, new in zip(lines, identities, strict=True)}
    for line, row in zip(lines, again, strict=True):
        before = json.loads(line)
        changed = {"identity": moved[before["identity"]], "successor": moved.get(before["successor"]), "user": "ben"}
        assert {**row, "written": 0} == {**before, **changed, "written": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: expected an object"),
        ('{"note": "x"}', 'line 2: field "text" is missing'),
        ('{"text": " "}', 'line 2: field "text" is empty'),
        ('{"text": "x", "run": " "}', "line 2: the scope's run is ' '"),
        ('{"text": "x", "metadata": 3}', "line 2: .*int"),
    ],
)
def test_one_wrong_line_and_nothing_is_stored(opened, line, message):
    memory = opened()
    with pytest.raises(PalimpsestError, match=message):
        imported(memory.items, ['{"text": "fine"}', line])
    assert memory.items.all("all") == []
    assert memory.search("fine") == []
    assert imported(memory.items, ["", '{"text": "fine"}\n']) == [memory.items.all()[0].identity]


def test_another_encoder_makes_all_vectors_again(opened):
    memory, other = opened(), opened()
    ids = memory.items.add([Record(text=f"The {x} is blue.") for x in ("house", "boat", "train")])
    other.search("boat")
    assert memory._open.reembed(HashedWords(width=64, name="narrow")) == 3
    assert memory.search("The boat is blue.", 1)[0].identity == ids[1]
    assert memory.search("The boat is blue.", 1)[0].score == pytest.approx(1, abs=1e-5)
    memory.add(Record(text="A fourth."))
    assert len(memory.search("blue", 10)) == 4
    with pytest.raises(PalimpsestError, match="was re-embedded with narrow meanwhile"):
        other.search("boat")
    with pytest.raises(PalimpsestError, match="was made with the encoder narrow, not hashed-words"):
        opened()


def test_the_doctor_counts_what_takes_up_room(opened):
    memory = opened(repeated="keep")
    memory.items.add([Record(text="The very same text here.")] * 3)
    memory.items.add([Record(text="ok"), Record(text="The very same text here!")])
    old = memory.add(Record(text="Ada lives in Lyon."))
    memory.items.supersede(old, Record(text="Ben paints boats in winter."))
    health = examined(memory.items)
    assert (health.memories, health.current, health.superseded, health.faded) == (7, 6, 1, 0)
    assert (health.duplicates, health.near_duplicates, health.short) == (2, 3, 1)
    assert (health.problems, health.expired) == ((), 0)
    assert health.history == 8
    assert health.bytes > 0


def test_near_pairs_by_blocks_are_those_of_one_matrix(monkeypatch):
    vectors = unit(300, 8)
    scores = vectors @ vectors.T
    expected = sum(bool((scores[i, :i] >= 0.8).any()) for i in range(300))
    assert near_pairs(vectors, 0.8) == expected > 5
    monkeypatch.setattr("palimpsest.recall.doctor.BLOCK", 37)
    assert near_pairs(vectors, 0.8) == expected
