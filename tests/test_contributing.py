"""The method, the test and the reproduction printed in CONTRIBUTING.md are complete and work as they are."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from documented import blocks
from memorised import data, quiet, reciting
from palimpsest import cli
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.loading import load
from palimpsest.models.model import Model
from palimpsest.reproduce import harness, runner
from palimpsest.system import catalogue, create, facts_of, slug_of, to_dict
from palimpsest.tasks import HARNESS
from palimpsest.train import Training

METHOD, TEST, REPRODUCTION = blocks("CONTRIBUTING.md", "python")
MODULE = "third_party_wga"
TINY = {"training.max_steps": 2, "training.batch_size": 4, "training.learning_rate": 1e-3}


@pytest.fixture
def wga(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the printed method, installed as a third party would."""
    (tmp_path / f"{MODULE}.py").write_text(METHOD, encoding="utf-8")
    info = tmp_path / "wga-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wga\nVersion: 1.0\n", encoding="utf-8")
    (announced,) = blocks("CONTRIBUTING.md", "toml")
    entry = announced.replace('[project.entry-points."palimpsest.systems"]', "[palimpsest.systems]").replace('"', "")
    (info / "entry_points.txt").write_text(entry.replace("your_package.wga", MODULE), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    catalogue.cache_clear()
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)
    catalogue.cache_clear()


def printed(source: str, name: str) -> dict[str, Any]:
    """The names that a printed file defines."""
    module = types.ModuleType(name)
    exec(compile(source, f"CONTRIBUTING.md: {name}", "exec"), vars(module))
    return vars(module)


def made(**fields: Any) -> Any:
    return create("wga", **TINY, **fields)


def test_the_example_is_about_forty_lines_and_matches_the_worked_number(wga):
    code = METHOD.partition('"""\n\n')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 45
    probabilities = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    loss = wga.weighted_ascent(probabilities.log(), 1.0).mean()
    assert loss.item() == pytest.approx(-0.3465736, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, probabilities)  # p / 2 d log p: none flows through the weight
    torch.testing.assert_close(gradient, torch.full((2,), 0.5, dtype=torch.float64))


def test_the_example_is_listed_shown_and_offered(wga, capsys):
    assert facts_of("wga").module == MODULE
    assert cli.main(["list"]) == 0
    assert cli.main(["show", "wga"]) == 0
    assert "Weighted gradient ascent" in capsys.readouterr().out


def test_the_example_comes_back_from_its_settings(wga):
    method = made(beta=0.5)
    assert slug_of(method) == "wga"
    assert create("wga", **json.loads(json.dumps(to_dict(method)))) == method
    with pytest.raises(PalimpsestError, match=r"wga: beta is -1, expected at least 0"):
        made(beta=-1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen", "moe"])
def test_the_example_changes_a_copy_of_any_model(wga, architecture, tokens, tmp_path, request):
    model: Model = request.getfixturevalue(architecture)
    before = model.digest()
    result = made().apply(model, data(), quiet())
    assert model.digest() == before != result.digest()
    assert no_hooks_left(result.network)
    entry = result.ledger.entries[-1]
    assert (entry.method, entry.weights_before, entry.weights_after) == ("wga", before, result.digest())
    assert set(entry.data) == {"forget", "retain"}
    assert made().apply(model, data(), quiet()).digest() == result.digest()
    assert made().apply(model, data(), quiet(seed=1)).digest() != result.digest()
    loaded = load(result.save_pretrained(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, result(input_ids=tokens).logits)


def test_the_example_works_without_a_retain_set_and_names_a_missing_forget_set(wga):
    alone = made().apply(reciting(), data().replace(retain=None), quiet())
    assert set(alone.ledger.entries[-1].data) == {"forget"}
    with pytest.raises(PalimpsestError, match='wga needs the role "forget"'):
        made().apply(reciting(), data().replace(forget=None), quiet())


def test_the_printed_test_passes(wga, monkeypatch):
    monkeypatch.setitem(sys.modules, "palimpsest.erase.wga", wga)
    names = printed(TEST, "test_wga")
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_the_printed_reproduction_runs(wga, monkeypatch, tmp_path):
    short = dataclasses.replace(harness.LEARNING, training=Training(max_steps=1))
    monkeypatch.setattr(harness, "LEARNING", short)
    names = printed(REPRODUCTION, "reproduce_wga")
    monkeypatch.setitem(names, "HARNESS", {"*": {**HARNESS["*"], "training.max_steps": 1}})
    reproduction = names["REPRODUCTION"]
    outcome = reproduction.measure((0,), tmp_path, quiet())
    assert [row["model"] for row in outcome.rows] == ["before", "gold", "gradient-ascent", "wga"]
    assert outcome.verdict in ("holds", "does not hold", "inconclusive")
    assert "| model | seed |" in runner.markdown(reproduction, outcome, 1.0, (0,))
