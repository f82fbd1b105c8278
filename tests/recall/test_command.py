from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from palimpsest import cli
from palimpsest.recall.command import ACTIONS
from remembering import left_of


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store" / "memory.db"


def run(capsys, *words: object, code: int = 0) -> str:
    """What a command prints."""
    try:
        ended = cli.main(["recall", "hema", *map(str, words)])
    except SystemExit as end:
        ended = int(end.code or 0)
    told = capsys.readouterr()
    assert ended == code, told.err
    return told.out if code == 0 else told.err


def test_a_memory_from_its_first_day_to_its_last(store, capsys, monkeypatch):
    store.parent.mkdir()
    here = ("--store", store)
    first, second = run(capsys, "add", "Ada lives in Lyon.", "The cat is called Rex.", *here).split()
    monkeypatch.setattr(sys, "stdin", io.StringIO("A line from a pipe.\n\nAnother one.\n"))
    assert len(run(capsys, "add", *here, "--metadata", "from", "pipe", "--pinned").split()) == 2
    found = run(capsys, "search", "Where is Ada's home?", *here, "--limit", "1")
    assert found.split()[0] == first
    assert "Ada lives in Lyon." in found
    asked = ("search", "line", *here, "--json", "--filter", '{"from": "pipe"}', "--ranking", "fused")
    listed = json.loads(run(capsys, *asked))
    assert {hit["text"] for hit in listed} == {"A line from a pipe.", "Another one."}
    assert {"cosine", "salience"} <= set(listed[0]["why"])
    assert run(capsys, "update", first, "Ada lives in Porto.", *here).strip() == first
    newer = run(capsys, "update", first, "Ada lives in Faro.", *here, "--supersede").strip()
    history = run(capsys, "history", first, *here)
    assert [line.split()[3] for line in history.splitlines()] == ["added", "updated", "superseded"]
    assert "Lyon" in history
    exported = run(capsys, "export", *here)
    assert json.loads(exported.splitlines()[0])["text"] == "Ada lives in Porto."
    planned = run(capsys, "forget", *here, "--containing", "ada lives", "--dry-run")
    assert planned.startswith("would forget: 2 memories")
    assert run(capsys, "forget", *here, "--containing", "ada lives").startswith("forgotten: 2 memories")
    assert left_of("Ada lives in Lyon. Porto. Faro.", store.parent, shortest=4) == {}
    left = [json.loads(line)["identity"] for line in run(capsys, "export", *here).splitlines()]
    assert second in left
    assert not {first, newer} & set(left)
    assert run(capsys, "history", *here, "--purge").startswith("purged: ")
    assert run(capsys, "history", *here) == ""
    shown = run(capsys, "stats", *here)
    assert "3 current, 0 others" in shown
    assert "all-MiniLM-L6-v2" in shown
    checked = run(capsys, "doctor", *here, "--scrub")
    assert "memories         3" in checked
    assert "problem " not in checked
    copy = store.with_name("copy.db")
    lines = store.with_name("lines.jsonl")
    lines.write_text(run(capsys, "export", *here))
    assert run(capsys, "import", lines, "--store", copy) == "imported: 3 memories\n"
    assert [json.loads(x)["pinned"] for x in run(capsys, "export", "--store", copy).splitlines()] == [False, True, True]
    assert (
        run(capsys, "forget", "--store", copy, "--everything", "--dry-run")
        == "would forget: all 3 memories of default\n"
    )
    assert run(capsys, "forget", "--store", copy, "--everything") == "forgotten: all 3 memories of default\n"


def test_usage_names_every_action(capsys):
    for words in (["recall"], ["recall", "hema"], ["recall", "--help"]):
        code = 0 if "--help" in words else 2
        assert cli.main(words) == code
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in ACTIONS)
        assert "hema" in shown


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_explains_itself(action, capsys):
    assert "--store" in run(capsys, action, "--help")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serach", "x"), "recall hema has no action 'serach'. Did you mean \"search\""),
        (("search", "x", "--store", "{}/no.db"), "there is no store"),
        (("export", "--store", "{}/no.db"), "there is no store"),
        (("add", "--store", "{}/no.db"), "there is nothing to add"),
        (("forget", "--store", "{}/a.db"), "nothing was named to forget"),
        (("forget", "99", "--store", "{}/a.db"), "there is no memory 99"),
        (("search", "x", "--store", "{}/a.db", "--filter", "{{"), "--filter is not valid JSON"),
        (("import", "{}/nothing.jsonl", "--store", "{}/a.db"), "there is no file"),
        (("import", "{}/bad.jsonl", "--store", "{}/a.db"), "bad.jsonl, line 2: not valid JSON"),
        (("reembed", "--store", "{}/a.db"), "reembed needs --encoder NAME"),
        (("search", "x", "--store", "{}/bad.jsonl"), "is not a store of palimpsest"),
    ],
    ids=str,
)
def test_wrong_words_get_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    if "{}/a.db" in words:
        run(capsys, "add", "something", "--store", tmp_path / "a.db")
    told = run(capsys, *(word.format(tmp_path) for word in words), code=2)
    assert message in told
    assert told.count("\n") == 1


def test_an_unknown_system_is_named(capsys):
    assert cli.main(["recall", "hem", "add"]) == 2
    assert "there is no system 'hem' under recall. Did you mean \"hema\"" in capsys.readouterr().err
