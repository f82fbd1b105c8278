"""What every store does, embedded or on a server."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.finding import diverse
from remembering import HashedWords, left_of, unit

LYON = "Ada lives in Lyon."


def texts(hits):
    return [hit.text for hit in hits]


def test_what_is_added_is_found_whole_and_after_opening_again(opened):
    memory = opened()
    record = Record(prompt="Where was Ada born?", answer="In Lyon.", subject="Ada")
    identity = memory.add(record, metadata={"topic": "birth", "tags": ["é"]}, happened=12.5)
    chat = memory.add(Record(messages=({"role": "user", "content": "Hello there"},)))
    for place in (memory, opened()):
        (hit,) = place.search("Ada born", 1)
        assert (hit.identity, hit.record) == (identity, record)
        assert (hit.memory.metadata, hit.memory.happened) == ({"topic": "birth", "tags": ["é"]}, 12.5)
        assert place.items.get(chat).record.messages == ({"role": "user", "content": "Hello there"},)


def test_the_ranking_is_that_of_brute_force_whatever_the_length_of_the_query(opened):
    memory, vectors = opened(), unit(300).copy()
    vectors[100:140] = vectors[100]
    ids = memory.items.add([Record(text=f"chunk {i}") for i in range(300)], vectors=vectors)
    memory.items.forget({ids[i]: "test" for i in (3, 120, 250)})
    exact = vectors.astype(np.float64)
    for query in (*unit(5, seed=4), vectors[100]):
        left = [i for i in range(300) if i not in (3, 120, 250)]
        order = sorted(left, key=lambda i: (-round(float(exact[i] @ query), 6), -i))  # every text is a turn of its own
        for scale in (1.0, 1e-6, 1e6):
            found = [hit.identity for hit in memory.search("", 20, vector=query * scale, touch=False)]
            assert found == [ids[i] for i in order[:20]]


def test_scores_are_explained(opened):
    memory = opened()
    memory.add(Record(text=LYON))
    (hit,) = memory.search("Lyon", 1, ranking="fused")
    assert set(hit.why) == {"score", "cosine", "words", "salience", "turn"}
    assert hit.score == pytest.approx(2 / 61)
    (hit,) = memory.search("Lyon", 1)
    expected = float(np.dot(*HashedWords().encode(["Lyon", LYON])))
    assert hit.score == hit.why["cosine"] == pytest.approx(expected, abs=1e-5)
    assert hit.why["salience"] == pytest.approx(1.5)  # the search before was its use, in the same turn


def test_hits_can_be_made_to_differ(opened):
    """Two texts say the same; the third is a little further away, but something else."""
    memory = opened()
    vectors = [[1.0, 0.0], [0.99, 0.14], [0.8, -0.6]]
    wide = np.zeros((3, memory.items.opened.width))
    wide[:, :2] = vectors
    memory.items.add([Record(text=text) for text in ("lemon", "melon", "plum")], vectors=wide)
    query = wide[0] + wide[1] / 2
    assert texts(memory.search("", 2, vector=query)) == ["lemon", "melon"]
    assert texts(memory.search("", 2, vector=query, diversity=0.7)) == ["lemon", "plum"]
    assert texts(memory.search("", 3, vector=query, diversity=1.0)) == ["lemon", "plum", "melon"]
    assert texts(opened(diversity=0.7).search("", 2, vector=query)) == ["lemon", "plum"]
    for ranking in ("words", "fused"):
        assert texts(memory.search("lemon", 1, ranking=ranking, diversity=0.2)) == ["lemon"]
    assert memory.search("nothing of it", 2, ranking="words", diversity=0.5) == []
    with pytest.raises(PalimpsestError, match="expected from 0 to 1"):
        memory.search("lemon", diversity=1.5)


def test_maximal_marginal_relevance_by_hand():
    """Second choice: 0.5 * 0.9 - 0.5 * 1.0 = -0.05 for the likeness, 0.5 * 0.3 - 0.5 * 0.0 = 0.15 for the stranger."""
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert diverse(np.array([1.0, 0.9, 0.3]), vectors, 3, 0.5) == [0, 2, 1]
    assert diverse(np.array([1.0, 0.9, 0.3]), vectors, 2, 0.0) == [0, 1]


def test_a_second_opinion_orders_the_nearest_anew(opened):
    seen = []

    def shortest(query, found):
        seen.append((query, len(found)))
        return [-len(text) for text in found]

    memory = opened(reranker=shortest)
    memory.items.add([Record(text=LYON + " " + "More words. " * i) for i in range(12)])
    hits = memory.search("Lyon", 2)
    assert seen == [("Lyon", 8)]
    assert [hit.score for hit in hits] == [hit.why["rerank"] for hit in hits]
    assert len(hits[0].text) < len(hits[1].text)
    with pytest.raises(PalimpsestError, match="the reranker gave 1 scores for 8 texts"):
        opened(reranker=lambda query, found: [1.0]).search("Lyon", 2)


def test_a_gate_sees_everything_before_it_is_stored(opened, place):
    """Whatever comes in, by any way, is stored as the gate gives it: nowhere are the private words left."""

    def gate(record):
        if "poison" in record.text:
            raise PalimpsestError("the gate refuses this text.")
        return dataclasses.replace(record, text=record.text.replace("0171 5550", "[phone number]"))

    memory = opened(gate=gate)
    first = memory.add(Record(text="Call me on 0171 5550."))
    memory.add_turn("My number is 0171 5550, remember it.", "I will call 0171 5550.")
    memory.items.supersede(first, Record(text="Rather call 0171 5550 at night."))
    memory.update(memory.add(Record(text="A note.")), Record(text="A note: 0171 5550."))
    assert len(memory.items.all("all")) == 5
    assert sum("[phone number]" in found.text for found in memory.items.all("all")) == 5
    assert "[phone number]" in memory.summary
    assert not any("0171" in f"{change.before}" for change in memory.history())
    with pytest.raises(PalimpsestError, match="the gate refuses this text"):
        memory.add(Record(text="poison"))
    assert len(memory.items.all("all")) == 5
    memory.close()
    if not place.startswith("postgres"):
        assert not left_of("0171 5550", Path(place).parent)


def test_vectors_of_what_is_gone_are_zero(opened):
    memory = opened()
    kept, gone = memory.items.add([Record(text="one"), Record(text="two")])
    numbers = memory.items.numbers([kept]) + memory.items.numbers([gone])
    memory.forget(gone)
    found = memory.items.opened.engine.vectors(numbers)
    assert np.linalg.norm(found, axis=1).round(5).tolist() == [1.0, 0.0]
    memory.forget(kept)
    assert not memory.items.opened.engine.vectors(numbers).any()


def test_words_are_found_where_meaning_is_not(opened):
    memory = opened()
    memory.items.add([Record(text=f"The {x} is blue.") for x in ("house", "boat", "zq77x", "car")])
    assert texts(memory.search('zq77x ("AND* NEAR', 5, ranking="words")) == ["The zq77x is blue."]
    assert texts(memory.search("houses", 5, ranking="words")) == ["The house is blue."]  # stemmed
    assert memory.search("?!", 5, ranking="words") == []
    assert texts(memory.search("zq77x", 1, ranking="fused")) == ["The zq77x is blue."]


def test_nobody_sees_or_touches_what_is_anothers(opened):
    ada, ben = opened(user="ada"), opened(user="ben")
    mine = ada.add(Record(text="Ada's secret plan"))
    ben.add(Record(text="Ben's secret plan"))
    assert texts(ben.search("secret plan", 5)) == ["Ben's secret plan"]
    assert [m.text for m in ben.items.all("all")] == ["Ben's secret plan"]
    for act in (ben.items.get, ben.forget, ben.items.restore, lambda i: ben.update(i, Record(text="x"))):
        with pytest.raises(PalimpsestError, match=f"there is no memory {mine} of 'ben'"):
            act(mine)
    assert ben.history(mine) == []
    assert ben.items.purge_history() == 1
    assert len(ada.history()) == 1


def test_a_user_sees_all_runs_and_a_run_only_its_own(opened):
    one, two, both = opened(run="one"), opened(run="two"), opened()
    one.add(Record(text="The first trip"))
    two.add(Record(text="The second trip"))
    assert texts(one.search("trip", 5)) == ["The first trip"]
    assert sorted(texts(both.search("trip", 5))) == ["The first trip", "The second trip"]
    assert one.items.forget_all() == 1
    assert texts(both.search("trip", 5)) == ["The second trip"]
    with pytest.raises(PalimpsestError, match="nothing is stored for user 'default', run 'one'"):
        one.items.forget_all()


def test_filters_read_on_until_enough_pass(opened):
    memory = opened()
    memory.items.add([Record(text=f"note number {i}") for i in range(200)])
    rare = memory.items.add(
        [Record(text=f"other number {i}") for i in range(3)], metadata={"kind": "rare", "year": 2020}
    )
    where = {"kind": "rare", "year": {"gte": 2020}}
    assert sorted(hit.identity for hit in memory.search("note number", 3, where=where)) == rare
    assert len(memory.search("note number", 50, where=where)) == 3
    assert memory.search("note number", 5, where={"year": {"gt": 2020}}) == []


def test_update_keeps_what_it_was_and_undo_brings_it_back(opened):
    memory = opened()
    identity = memory.add(Record(text=LYON, subject="Ada"), metadata={"a": 1})
    memory.update(identity, Record(text="Ada lives in Porto."))
    assert texts(memory.search("Ada lives", 5)) == ["Ada lives in Porto."]
    assert memory.search("Lyon", 5, ranking="words") == []
    assert [change.event for change in memory.history(identity)] == ["added", "updated"]
    memory.items.undo(identity)
    assert memory.items.get(identity).record == Record(text=LYON, subject="Ada")
    assert memory.items.get(identity).metadata == {"a": 1}
    with pytest.raises(PalimpsestError, match="was never updated"):
        memory.items.undo(memory.add(Record(text="new")))


def test_what_is_superseded_is_seen_in_the_past_only(opened):
    memory = opened()
    old = memory.add(Record(text=LYON), happened=100.0)
    new = memory.items.supersede(old, Record(text="Ada lives in Porto."), happened=200.0)
    assert texts(memory.search("Ada lives", 5)) == ["Ada lives in Porto."]
    assert sorted(texts(memory.search("Ada lives", 5, view="all"))) == [LYON, "Ada lives in Porto."]
    assert texts(memory.search("Ada lives", 5, as_of=150.0)) == [LYON]
    assert texts(memory.search("Ada lives", 5, as_of=200.0)) == ["Ada lives in Porto."]
    assert memory.search("Ada lives", 5, as_of=99.0) == []
    assert memory.search("Ada", 5, as_of=150.0, ranking="words")[0].text == LYON
    assert (memory.items.get(old).ended, memory.items.get(old).successor) == (200.0, new)
    with pytest.raises(PalimpsestError, match=f"memory {old} was superseded by {new} already"):
        memory.items.supersede(old, Record(text="again"))


def test_the_same_text_is_stored_once_unless_wanted(opened):
    memory = opened()
    first = memory.add(Record(text=LYON))
    assert memory.add(Record(text=LYON)) == first
    assert [change.event for change in memory.history(first)] == ["added", "repeated"]
    assert opened(user="ben").add(Record(text=LYON)) != first
    assert opened(repeated="keep").add(Record(text=LYON)) != first
    memory.forget(first)
    assert memory.add(Record(text=LYON)) != first


def test_what_expires_is_hidden_then_forgotten(opened, monkeypatch):
    memory, now = opened(), time.time()
    identity = memory.add(Record(text="The code is 99."), expires=now + 60)
    kept = memory.add(Record(text="The code is secret."))
    assert len(memory.search("code", 5)) == 2
    with pytest.raises(PalimpsestError, match="nothing was named to forget"):
        memory.items.forget(memory.items.chosen(expired=True))
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert [hit.identity for hit in memory.search("code", 5)] == [kept]
    assert memory.items.forget(memory.items.chosen(expired=True)).reasons == {identity: "has expired"}
    memory.items.set(kept, expires=now + 62, pinned=True, metadata={"x": 1})
    changed = memory.items.get(kept)
    assert (changed.expires, changed.pinned, changed.metadata) == (now + 62, True, {"x": 1})
    monkeypatch.undo()


def test_a_deletion_request_finds_every_version_and_says_why(opened):
    memory = opened()
    old = memory.add(Record(text="Ada's phone is 555-1234-777."))
    new = memory.items.supersede(old, Record(text="Ada's phone is 555-9999-888."))
    near = memory.add(Record(text="Ada's phone is 555-9999-888!"))
    other = memory.add(Record(text="The weather was fine."), metadata={"ward": "ada"})
    assert set(memory.items.chosen(containing="ADA'S PHONE")) == {old, new, near}
    like = memory.items.chosen(like=new, alike=0.9)
    assert {new, near} <= set(like)
    assert other not in like
    assert like[near].startswith("cosine 1.00 to memory ")
    assert set(memory.items.chosen(where={"ward": "ada"}, containing="phone")) == {old, new, near, other}
    before = memory.items.forget(memory.items.chosen(containing="phone"), dry_run=True)
    assert set(before.identities) == {old, new, near}
    assert len(memory.items.all("all")) == 4
    memory.items.forget(memory.items.chosen(containing="phone"))
    assert [m.identity for m in memory.items.all("all")] == [other]


def test_a_long_text_is_one_memory_of_several_chunks(opened, tmp_path):
    memory = opened(chunk_tokens=8)
    text = "The harbour was full of boats. Nobody had seen so many. In the garden grew zz99marigolds beside the wall."
    identity = memory.add(Record(text=text))
    (hit,) = memory.search("marigolds in the garden", 1)
    assert hit.identity == identity
    assert hit.text != text
    assert hit.memory.text == text
    assert len(memory.items.numbers([identity])) > 1
    memory.update(identity, Record(text="Short now."))
    assert memory.items.numbers([identity]) != []
    assert memory.items.get(identity).text == "Short now."
    memory.forget(identity)
    assert memory.search("marigolds garden", 5) == []
    assert not left_of("zz99marigolds", tmp_path)


def test_identities_are_never_used_twice(opened):
    memory = opened()
    seen = set()
    for _ in range(3):
        identity = memory.add(Record(text="again"))
        assert identity not in seen
        seen.add(identity)
        memory.forget(identity)


def test_another_connection_sees_adds_changes_and_forgets_at_once(opened):
    one, two = opened(), opened()
    assert two.search("anything", 5) == []
    first = one.add(Record(text=LYON))
    assert texts(two.search("Ada", 5)) == [LYON]
    one.update(first, Record(text="Ada lives in Porto."))
    assert texts(two.search("Ada", 5)) == ["Ada lives in Porto."]
    two.forget(first)
    assert one.search("Ada", 5) == []
    with pytest.raises(PalimpsestError, match="there is no memory"):
        one.items.get(first)


def test_what_another_has_forgotten_takes_no_place_among_the_nearest(opened):
    one, two = opened(), opened()
    ids = one.items.add([Record(text=f"The garden number {i}") for i in range(6)])
    assert len(two.search("garden number", 3, touch=False)) == 3
    first = [hit.identity for hit in two.search("garden number", 4, touch=False)]
    one.items.forget(dict.fromkeys(first, "test"))
    assert {hit.identity for hit in two.search("garden number", 2, touch=False)} == set(ids) - set(first)


def test_history_can_be_purged_for_good(opened, tmp_path):
    memory = opened()
    identity = memory.add(Record(text="old zz77quokka text"))
    memory.update(identity, Record(text="new text"))
    assert any("zz77quokka" in (change.before or "") for change in memory.history())
    assert memory.items.purge_history(before=0.0) == 0
    assert memory.items.purge_history() == 2
    assert memory.history() == []
    assert memory.items.get(identity).text == "new text"
    assert not left_of("zz77quokka", tmp_path)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.ones(255), "the embedding has 255 numbers, but the store keeps vectors of 256"),
        (np.ones((2, 256)), "the embedding has 512 numbers"),
        (np.full(256, np.nan), "not finite"),
        (np.full(256, np.inf), "not finite"),
        (np.zeros(256), "all zeros"),
    ],
)
def test_a_wrong_embedding_is_refused_and_nothing_is_stored(opened, vector, message):
    memory = opened()
    with pytest.raises(PalimpsestError, match=message):
        memory.add(Record(text="x"), vector=vector)
    with pytest.raises(PalimpsestError, match=message):
        memory.search("x", vector=vector)
    assert memory.items.all("all") == []
    assert memory.history() == []


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.add(Record(text=" \n")), "the text is empty"),
        (lambda m: m.add(Record(text="a\x00b")), "NUL character"),
        (lambda m: m.add(Record(image=np.zeros(3))), "the record is an image"),
        (lambda m: m.add(Record(text="x"), metadata={"a": {1, 2}}), "the metadata cannot be stored"),
        (lambda m: m.add(Record(text="x"), metadata={"a": float("nan")}), "the metadata cannot be stored"),
        (lambda m: m.add(Record(text="x"), expires=1.0), "expires is 1.0, which is past"),
        (lambda m: m.items.add([Record(text="x")], vectors=unit(2)), "1 records come with 2 vectors"),
        (lambda m: m.search(" "), "the query is empty"),
        (lambda m: m.search("x", 0), "limit is 0, expected a whole number of at least 1"),
        (lambda m: m.search("x", True), "limit is True"),
        (lambda m: m.search("x", ranking="dens"), "ranking is 'dens'. Did you mean \"dense\""),
        (lambda m: m.search("x", where={"a": {"gr": 1}}), "no operator 'gr'"),
        (lambda m: m.forget("7"), "there is no memory 7 of 'default'"),
        (lambda m: m.forget("7; DROP TABLE items"), "identities are numbers"),
        (lambda m: m.update("7", Record(text="x")), "there is no memory 7"),
        (lambda m: m.items.set("7", pinned=True), "there is no memory 7"),
        (lambda m: m.items.set(m.add(Record(text="x")), pined=True), "set takes pinned, expires and metadata"),
        (lambda m: m.items.restore(m.add(Record(text="x"))), "has not faded"),
        (lambda m: m.items.forget({}), "nothing was named to forget"),
        (lambda m: m.items.chosen(), "nothing was named to forget"),
        (lambda m: m.items.chosen(like="1", alike=0.0), "alike is 0.0"),
    ],
)
def test_bad_input_is_named(opened, act, message):
    with pytest.raises(PalimpsestError, match=message):
        act(opened())


def test_the_store_checks_itself(opened):
    memory = opened()
    memory.items.add([Record(text=f"text {i}") for i in range(5)])
    memory.forget(memory.items.all()[0].identity)
    assert memory._open.engine.problems() == []
    assert memory._open.engine.bytes() > 0
    memory._open.engine.all("DELETE FROM vectors WHERE number = (SELECT MAX(number) FROM vectors)")
    assert memory._open.engine.problems() == ["1 chunks have no vector"]
