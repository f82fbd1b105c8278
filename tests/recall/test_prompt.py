from __future__ import annotations

import pytest

from conftest import build_tokenizer
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall.memories import Hit, Memory, Scope
from palimpsest.recall.prompt import compose, messages_of


def said(number: int, text: str, role: str = "user") -> Memory:
    return Memory(
        identity=str(number), record=Record(text=text), scope=Scope(user="a"), role=role, turn=number, happened=0.0,
        written=0.0, ended=None, successor=None, expires=None, pinned=False, faded=False, last_retrieved=-1,
        retrieved=0, metadata={},
    )  # fmt: skip


def hit(number: int, text: str, score: float) -> Hit:
    return Hit(memory=said(number, text), number=number, text=text, score=score, why={})


HITS = [hit(7, "the cat sat", 0.9), hit(2, "a long road runs", 0.8), hit(5, "they went out", 0.7)]
TAIL = [said(8, "who wrote this"), said(8, "not known", role="assistant")]


def count_with(chat: bool):
    reader = Encoder(build_tokenizer(chat=chat), 4096)
    return lambda messages: len(reader.conversation(messages))


def whole(chat=True, budget=4096, **how):
    return compose("be kind", "It rained.", HITS, TAIL, "and now ?", budget=budget, count=count_with(chat), **how)


def test_the_order_is_system_summary_retrieved_tail_user():
    head, *rest = messages_of("be kind", "It rained.", HITS, TAIL, "and now ?")
    assert head["role"] == "system"
    parts = ["be kind", "It rained.", "[turn 2] user: a long road", "[turn 5] user: they", "[turn 7] user: the cat"]
    places = [head["content"].index(part) for part in parts]
    assert places == sorted(places)  # chronological, although turn 7 is the most similar
    assert [(m["role"], m["content"]) for m in rest] == [
        ("user", "who wrote this"),
        ("assistant", "not known"),
        ("user", "and now ?"),
    ]


def test_without_anything_there_is_only_the_user():
    assert messages_of("", " ", [], [], "hello") == ({"role": "user", "content": "hello"},)


@pytest.mark.parametrize("chat", [True, False])
def test_one_token_too_many_drops_only_the_least_similar(chat):
    full = whole(chat)
    assert (full.kept, full.dropped) == (tuple(HITS), ())
    assert whole(chat, budget=full.tokens).kept == tuple(HITS)
    less = whole(chat, budget=full.tokens - 1)
    assert (less.kept, less.dropped) == (tuple(HITS[:2]), (HITS[2],))
    assert less.tokens < full.tokens


@pytest.mark.parametrize("chat", [True, False])
def test_shares_add_up_and_what_is_counted_is_what_the_model_reads(chat):
    prompt = whole(chat)
    assert list(prompt.shares) == ["system", "summary", "retrieved", "last turns", "user"]
    assert sum(prompt.shares.values()) == prompt.tokens == count_with(chat)(prompt.messages)
    assert all(tokens > 0 for tokens in prompt.shares.values())


def test_summary_tail_and_user_are_never_dropped():
    bare = compose("be kind", "It rained.", [], TAIL, "and now ?", budget=4096, count=count_with(True))
    assert whole(budget=bare.tokens).messages == bare.messages
    with pytest.raises(PalimpsestError, match=rf"the budget is {bare.tokens - 1} tokens, but .* take {bare.tokens}"):
        whole(budget=bare.tokens - 1)


def test_unless_not_strict_then_the_oldest_turns_go():
    bare = compose("be kind", "It rained.", [], TAIL, "and now ?", budget=4096, count=count_with(True))
    short = whole(budget=bare.tokens - 1, strict=False)
    assert short.cut == 1
    assert [m["content"] for m in short.messages[1:]] == ["not known", "and now ?"]
    with pytest.raises(PalimpsestError, match="summary and user's text take"):
        whole(budget=3, strict=False)
