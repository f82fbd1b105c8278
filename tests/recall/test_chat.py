from __future__ import annotations

import io
import sys

import pytest

from conftest import build_model
from memorised import quiet, reciting
from palimpsest import cli
from palimpsest.errors import PalimpsestError
from palimpsest.models.generation import greedy_answers
from palimpsest.recall.chat import Chat
from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords


def chat(memory: ConversationMemory, **how: object) -> Chat:
    return Chat(reciting(), memory, quiet(), max_new_tokens=8, **how)  # type: ignore[arg-type]


def test_what_the_model_reads_is_the_compiled_prompt_and_both_sides_are_stored(memory):
    talk = chat(memory)
    reply = talk.say("Where was Ada Moreau born ?")
    assert reply
    assert [(item.role, item.text) for item in memory.items.all()] == [
        ("user", "Where was Ada Moreau born ?"),
        ("assistant", reply),
    ]
    second = talk.say("What does Ada Moreau do for a living ?")
    asked = talk.prompt.messages
    assert [m["role"] for m in asked] == ["system", "user", "assistant", "user"]
    lines = "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in asked) + "Assistant:"
    model = reciting()
    from palimpsest.models.generation import continue_tokens

    (again,) = continue_tokens(model, [model.tokenizer(lines)["input_ids"]], quiet(), 8)
    assert model.tokenizer.decode(again, skip_special_tokens=True).strip() == second
    assert talk.prompt.tokens == len(model.tokenizer(lines)["input_ids"])
    assert greedy_answers(model, ["x"], quiet(), 1) is not None


def test_the_prompt_leaves_room_for_the_answer(memory):
    talk = chat(memory)
    assert talk.budget == talk.reader.max_length - 8
    for i in range(30):
        talk.say(f"the cat sat on the mat {i} " * 4)
        assert talk.prompt.tokens <= talk.budget
    model = build_model("gpt2")
    with pytest.raises(PalimpsestError, match="max-new-tokens is 200, but the model reads 128 tokens in all"):
        Chat(model, memory, quiet(), max_new_tokens=200)


def test_lines_with_a_slash_are_about_the_memory(memory):
    talk = chat(memory)
    assert talk.answer("/why") == "nothing was asked yet"
    assert talk.answer("/summary") == "nothing yet"
    talk.say("My cat sat in the rain .")
    for i in range(4):
        talk.say(f"The old town {i}")
    talk.say("Where was my cat ?")
    why = talk.answer("/why")
    assert "tokens: system" in why
    assert "cosine" in why
    assert "My cat sat in the rain ." in why
    found = talk.answer("/find cat rain")
    identity = found.split()[0]
    assert "My cat sat in the rain ." in found.splitlines()[0]
    assert talk.answer(f"/forget {identity}").startswith(f"forgotten: {identity}")
    assert "My cat sat in the rain ." not in talk.answer("/find cat rain")
    assert talk.answer("/stats").startswith("6 turns, ")
    assert "/quit" in talk.answer("/help")
    assert talk.answer("/quit") is None
    assert talk.answer("  \n") == ""


def test_from_the_command_line_it_remembers_across_sessions(tmp_path, capsys, monkeypatch):
    model = reciting().save_pretrained(tmp_path / "model")
    store = tmp_path / "memory.db"
    monkeypatch.setattr(ConversationMemory, "open", _with_hashed_words(ConversationMemory.open))
    words = ["chat", "--store", str(store), "--model", str(model), "--max-new-tokens", "6", "--quiet"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where was Ada Moreau born ?\n/forget 99\n/stats\n"))
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert "1 turns, 2 memories" in told.out
    assert "there is no memory 99" in told.err.replace("\n", " ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/find Ada\n/quit\nnever read\n"))
    assert cli.main(words) == 0
    assert "Where was Ada Moreau born ?" in capsys.readouterr().out
    with ConversationMemory.open(str(store)) as memory:
        assert memory.items.state.turn == 1


def _with_hashed_words(plain):
    return lambda store, **how: plain(store, **{**how, "encoder": HashedWords()})
