from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from conftest import build_model
from memorised import people, probability, quiet
from palimpsest.audit.battery import probes
from palimpsest.comparing import publish
from palimpsest.comparison import Task, compare
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.loading import load
from palimpsest.models.model import Model
from palimpsest.report import evidence
from palimpsest.reproduce.harness import biographies, new_model
from palimpsest.system import create
from palimpsest.tasks import VALIDATION_SEED, tuned
from palimpsest.train import Training
from palimpsest.tuning import RATE, grids_of, score, to_markdown, tune
from palimpsest.write.finetune import Finetune

LEARN = Finetune(training=Training(learning_rate=1e-2, epochs=40, batch_size=4, weight_decay=0.0))
ONCE = Finetune(training=Training(learning_rate=1e-2, epochs=1))
SHORT = {"training.learning_rate": 1e-3, "training.epochs": 3}
METHODS = tuned(("npo", "gradient-ascent"), {"*": SHORT})


def start(seed: int) -> Model:
    return build_model("llama")


def roles(seed: int) -> Roles:
    """Two people to forget and two to keep; which, depends on the seed."""
    known = people()[4 * seed : 4 * seed + 8]
    return Roles(train=known, forget=known[:4], retain=known[4:])


TASK = Task(
    name="small",
    question="Can two of four people be erased?",
    source="four people",
    start=start,
    roles=roles,
    learn=LEARN,
    probes=tuple(probes(["answer-probability"])),
    max_new_tokens=3,
    command="palimpsest compare small",
)


def compared(folder: Path, task: Task = TASK, methods=METHODS, **options):
    return compare(task, methods, folder, run=quiet(), **options)


def cells(folder: Path) -> dict[str, int]:
    """When each cell was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}


def value(model, name: str) -> float:
    return next(v.value for reading in model.readings for v in reading.values if v.name == name)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a whole comparison, and what it found."""
    folder = tmp_path_factory.mktemp("comparison")
    return folder, compared(folder, default="npo")


def test_the_evidence_has_before_gold_and_every_method(done):
    found = done[1]
    assert [(m.name, m.part, m.seed) for m in found.models] == [
        ("before", "before", 0),
        ("gold", "gold", 0),
        ("npo", "erased", 0),
        ("gradient-ascent", "erased", 0),
    ]
    assert (found.seeds, found.default, found.command) == ((0,), "npo", "palimpsest compare small")
    assert found.data.roles["forget"].subjects == ("Ada Moreau", "Ben Okafor")
    assert found.models[2].weights is not None
    assert found.models[2].weights.changed > 0
    assert found.models[0].weights is None


def test_gold_never_saw_what_is_to_be_forgotten(done):
    folder, found = done
    before, gold, erased, _ = found.models
    learned = {m.part: m.ledger["entries"][0]["data"]["train"] for m in (before, gold)}
    known = roles(0)
    assert learned["before"] == known.digest()["train"]
    assert learned["gold"] == Roles(train=known.retain).digest()["train"]
    assert value(before, "probability/forget") > 0.5 > value(gold, "probability/forget")
    assert value(gold, "probability/retain") > 0.5
    assert value(erased, "probability/forget") < value(before, "probability/forget")
    assert sorted(path.name.split("-")[0] for path in (folder / "models").iterdir()) == ["before", "gold"]


def test_the_values_are_those_of_the_models_that_are_kept(done):
    folder, found = done
    before = load(next((folder / "models").glob("before-*")))
    assert value(found.models[0], "probability/forget") == pytest.approx(probability(before, roles(0).forget))


def test_every_method_starts_from_the_same_model(done):
    entries = [model.ledger["entries"] for model in done[1].models[2:]]
    assert len({entry[1]["weights_before"] for entry in entries}) == 1
    assert [[step["method"] for step in entry] for entry in entries] == [
        ["finetune", "npo"],
        ["finetune", "gradient-ascent"],
    ]


def never(seed: int) -> Model:
    raise AssertionError("a model was made although every cell is there")


def test_a_second_call_reads_the_cells(done):
    folder, found = done
    before = cells(folder)
    again = compared(folder, dataclasses.replace(TASK, start=never), default="npo")
    assert cells(folder) == before
    assert len(before) == 4
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())


def test_other_probes_are_measured_on_the_models_that_were_kept(done):
    folder, _ = done
    task = dataclasses.replace(TASK, start=never, probes=tuple(probes(["exact-memorisation"])))
    found = compared(folder, task, methods=())
    assert [model.readings[0].probe for model in found.models] == ["exact-memorisation"] * 2


def test_it_says_how_many_cells_are_left(tmp_path, capsys):
    task = dataclasses.replace(TASK, learn=ONCE, probes=tuple(probes(["exact-memorisation"])))
    compare(task, METHODS[:1], tmp_path, run=quiet(progress=True))
    assert "before, seed 0 (1 of 3)" in capsys.readouterr().err
    compare(task, METHODS, tmp_path, run=quiet(progress=True))
    told = capsys.readouterr().err
    assert f"(1 of {len(METHODS) - 1})" in told
    assert "before" not in told


@pytest.mark.parametrize("models", ["kept", "lost"])
def test_an_interrupted_comparison_computes_only_what_is_missing(models, tmp_path):
    task = dataclasses.replace(TASK, learn=ONCE)
    found = compared(tmp_path, task, METHODS[1:], keep_models=models == "kept")
    before = cells(tmp_path)
    lost = [name for name in before if json.loads((tmp_path / "cells" / name).read_text())["part"] == "erased"]
    (tmp_path / "cells" / lost[0]).unlink()
    again = compared(tmp_path, task, METHODS[1:])
    assert {name for name, written in cells(tmp_path).items() if written != before[name]} == set(lost)
    assert again.models[2].readings[0].values == found.models[2].readings[0].values
    assert (
        again.models[2].ledger["entries"][1]["weights_after"] == found.models[2].ledger["entries"][1]["weights_after"]
    )


def test_a_later_method_starts_from_the_model_that_learned(tmp_path):
    task = dataclasses.replace(TASK, learn=ONCE)
    compared(tmp_path, task, methods=())
    later = compared(tmp_path, dataclasses.replace(task, start=never), METHODS[1:])
    assert [model.part for model in later.models] == ["before", "gold", "erased"]


def test_models_are_not_kept_where_that_is_said(tmp_path):
    compared(tmp_path, dataclasses.replace(TASK, learn=ONCE), methods=(), keep_models=False)
    assert not (tmp_path / "models").exists()


def test_a_changed_setting_makes_a_new_cell(done):
    folder, found = done
    before = cells(folder)
    other = compared(folder, methods=tuned(("npo",), {"*": SHORT}, {"beta": 0.5}))
    new = set(cells(folder)) - set(before)
    assert len(new) == 1
    assert other.models[:2] == found.models[:2]
    assert other.models[2].settings["beta"] == 0.5
    assert {name: written for name, written in cells(folder).items() if name in before} == before


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"max_new_tokens": 2},
        {"learn": Finetune(training=Training(learning_rate=1e-3, epochs=1))},
        {"probes": ()},
        {"roles": lambda seed: roles(seed).replace(world=[Record(text="The cat sat on the mat")])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_cell_is_in_its_name(change, tmp_path):
    task = dataclasses.replace(TASK, learn=ONCE)
    compared(tmp_path, task, methods=())
    before = cells(tmp_path)
    compared(tmp_path, dataclasses.replace(task, **change), methods=())
    assert len(before) == 2
    assert len(set(cells(tmp_path)) - set(before)) == 2


def test_seeds_are_compared_apart_and_shown_together(tmp_path):
    task = dataclasses.replace(TASK, learn=ONCE)
    found = compared(tmp_path, task, METHODS[:1], seeds=(0, 1))
    assert found.seeds == (0, 1)
    assert [(m.name, m.seed) for m in found.models] == [(n, s) for s in (0, 1) for n in ("before", "gold", "npo")]
    assert len(cells(tmp_path)) == 6
    first, second = (found.models[i].ledger["entries"][0]["data"]["train"] for i in (0, 3))
    assert first != second


def test_a_comparison_never_changes_the_model_that_methods_start_from(tmp_path):
    task = dataclasses.replace(TASK, learn=ONCE)
    found = compare(task, METHODS, tmp_path, run=quiet(in_place=True))
    assert len({m.ledger["entries"][-1]["weights_before"] for m in found.models[2:]}) == 1


def test_publish_writes_evidence_table_and_report(done, tmp_path, capsys):
    publish(done[1], tmp_path)
    assert evidence.load(tmp_path / "evidence.json").models == done[1].models
    assert "gradient-ascent" in (tmp_path / "table.md").read_text().lower().replace(" ", "-")
    assert "Can two of four people be erased?" in (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_a_probe_is_no_method():
    with pytest.raises(PalimpsestError, match="rouge-recall measures a model; only systems that change one can be"):
        tuned(("npo", "rouge-recall"), {})


def test_settings_of_the_user_come_last_and_those_a_method_does_not_have_are_left_out():
    table = {"*": {"training.epochs": 3, "beta": 0.3}, "npo": {"beta": 0.2}}
    npo, ascent = tuned(("npo", "gradient-ascent"), table, {"training.epochs": 4})
    assert (npo.beta, npo.training.epochs, ascent.training.epochs) == (0.2, 4, 4)
    assert create("gradient-ascent", **{"training.epochs": 4}) == ascent


def test_the_score_of_tuning_rewards_being_as_near_to_gold_as_possible(done):
    gold = done[1].models[1]

    def at(forget: float, utility: float):
        reading = gold.readings[0]
        values = [dataclasses.replace(v, value=forget) for v in reading.values if v.name == "probability/forget"]
        made = dataclasses.replace(values[0], name="model_utility", value=utility)
        return dataclasses.replace(gold, readings=(dataclasses.replace(reading, values=(*values, made)),))

    start, aim = at(0.9, 0.5), at(0.1, 0.5)
    assert score(start, start, aim) == 0
    assert score(aim, start, aim) == pytest.approx(1)
    assert score(at(0.5, 0.25), start, aim) == pytest.approx(0.5)
    assert score(at(0.1, 0.9), start, aim) == pytest.approx(1)
    assert np.isclose(score(at(0.0, 0.5), start, aim), 2 * 0.875 / 1.875)


def test_tuning_tries_every_value_on_validation_data_and_resumes(tmp_path):
    asked = []

    def few(seed: int) -> Roles:
        asked.append(seed)
        known = biographies(seed)
        roles = ("train", "forget", "retain", "forget_probe", "retain_probe", "world")
        return Roles(**{role: known[role][:4] for role in roles})

    grids = {"*": (RATE, (1e-4, 1e-2)), "ssd": ("alpha", (1.0, 2.0))}
    task = dataclasses.replace(TASK, start=new_model, roles=few, learn=ONCE)
    given = ("gradient-ascent", "ssd")
    found = tune(task, given, {"*": {"training.epochs": 1}}, tmp_path, quiet(), grids)
    assert set(asked) == {VALIDATION_SEED}
    assert {name: tuple(scores) for name, scores in found.items()} == {"gradient-ascent": (1e-4, 1e-2), "ssd": (1, 2)}
    assert all(0 <= value <= 1 for scores in found.values() for value in scores.values())
    written = cells(tmp_path)
    assert tune(dataclasses.replace(task, start=never), given, {"*": {"training.epochs": 1}}, tmp_path, quiet(), grids)
    assert cells(tmp_path) == written


def test_the_value_with_the_best_score_is_taken():
    found = to_markdown({"npo": {1e-4: 0.2, 1e-3: 0.9, 3e-3: 0.5}, "ssd": {1.5: 0.4, 2: 0.3}}, grids_of("harness"))
    assert found.splitlines()[2:] == [
        "| npo | training.learning_rate | 0.0001, 0.001, 0.003 | 0.2, 0.9, 0.5 | 0.001 |",
        "| ssd | alpha | 1.5, 2 | 0.4, 0.3 | 1.5 |",
    ]


def test_no_value_is_taken_where_it_does_not_matter_which():
    found = to_markdown({"iau": {1e-4: 0.0, 1e-3: 0.0}}, grids_of("harness"))
    assert found.splitlines()[2:] == ["| iau | learning_rate | 0.0001, 0.001 | 0, 0 | - |"]


def test_every_grid_names_a_setting_of_its_method():
    for task in ("harness", "people"):
        for name, (setting, values) in grids_of(task).items():
            if name != "*":
                for value in values:
                    create(name, **{setting: value})
