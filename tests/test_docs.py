"""The generated pages of the documentation hold what the source says about every system."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from types import ModuleType

import pytest

from documented import ROOT
from palimpsest.system import VERBS, catalogue, create, system_class


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load()


@pytest.mark.parametrize("slug", list(catalogue()))
def test_a_page_has_the_facts_the_docstring_and_every_setting(slug):
    facts, page = catalogue()[slug], generate.pages()[slug]
    assert page.startswith(f"# {facts.title}\n")
    assert facts.fidelity in page
    for field in dataclasses.fields(create(slug)):
        assert f"`{field.name}" in page
    for deviation in facts.deviations:
        assert generate.escaped(deviation) in page
    module = inspect.getmodule(system_class(slug))
    for line in (inspect.getdoc(module) or "").splitlines():
        if line.startswith("    "):
            assert line.strip() in page  # equations and notation, character by character


def test_the_overview_links_every_system_under_its_verb():
    sections = re.split(r"^## ", generate.pages()["index"], flags=re.MULTILINE)[1:]
    assert tuple(section.split("\n")[0] for section in sections) == VERBS
    for slug, facts in catalogue().items():
        assert f"]({slug}.md)" in sections[VERBS.index(facts.verb)]


def test_an_own_default_of_a_nested_setting_has_the_origin_of_its_system():
    rows = {row[0]: row for row in generate.settings(create("finetune"))}
    assert rows["`training.learning_rate`"][4].startswith("ours")
    assert rows["`training.weight_decay`"][4] == "OpenUnlearning"


def test_a_reproduction_is_shown_where_there_is_one(monkeypatch, tmp_path):
    assert "## Reproduction" not in generate.pages()["retrain"]
    monkeypatch.setattr(generate, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    (tmp_path / "results" / "reproduce").mkdir(parents=True)
    (tmp_path / "results" / "reproduce" / "npo.md").write_text(
        "**Claim.** It holds.\n\n![a against b](npo.svg)\n\n[Another](flat.md).\n", encoding="utf-8"
    )
    assert "**Claim.** It holds." in generate.pages()["npo"]
    assert generate.results() == ["results/reproduce/npo.md"]
    assert "![a against b](../results/reproduce/npo.svg)" in generate.pages()["npo"]
    assert "[Another](../results/reproduce/flat.md)" in generate.pages()["npo"]


def test_prose_keeps_tables_and_takes_nothing_for_markup():
    text = "One <role> of a_b and `c_d` * e.\n\n    x   [n]\n\n    y = x * 2\n\nLast."
    assert generate.prose(text) == (
        "One \\<role\\> of a\\_b and `c_d` \\* e.\n\n```text\nx   [n]\n\ny = x * 2\n```\n\nLast."
    )
