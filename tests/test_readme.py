"""The examples of README.md and of the guides run as they are printed."""

from __future__ import annotations

import pytest
import tyro

from documented import PAGES, ROOT, blocks, commands, prepare
from palimpsest import cli

LONG = ("demo", "compare", "reproduce", "forget", "chat")
"""Commands of minutes, or that wait for somebody: their options are checked, the work is not done."""


class Understood(BaseException):
    """The options were understood."""


def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    understand = tyro.cli

    def stop(*arguments: object, **keywords: object) -> None:
        understand(*arguments, **keywords)  # type: ignore[call-overload]
        raise Understood

    monkeypatch.setattr(tyro, "cli", stop)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_in_python_run(page, tmp_path, monkeypatch):
    found = blocks(page, "python")
    if not found:
        pytest.skip("no Python in it")
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for block in found:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_short_commands_run(page, tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if words[0] not in LONG:
            assert cli.main(words) == 0, words


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page) if words[0] in LONG], ids=str)
def test_the_long_commands_are_understood(words, monkeypatch):
    only_parse(monkeypatch)
    with pytest.raises(Understood):
        cli.main(words)


def test_the_readme_names_no_system_by_hand_and_no_absolute_path():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for phrase in ("/home/", "/tmp/", "simnpo", "gradient-ascent"):
        assert phrase not in text
