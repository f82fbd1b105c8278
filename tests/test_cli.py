from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PEOPLE, build_model
from memorised import data, probability, reciting
from palimpsest import __version__, cli
from palimpsest.data.loading import load_records, write_records
from palimpsest.models.loading import load
from palimpsest.system import catalogue

FORGET = ("--forget-subject", *list(PEOPLE)[:2])
NOWHERE = "./no/such/thing.jsonl"
FAST = ("--precision", "float32", "--quiet", "--training.learning-rate", "1e-3", "--training.epochs", "5")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model that recites and the records that it learned."""
    home = tmp_path_factory.mktemp("cli")
    reciting().save_pretrained(home / "model")
    write_records(data().train, home / "people.jsonl")
    return home


def palimpsest(*words: object) -> int:
    """The exit code of a command."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:  # how tyro refuses options and shows help
        return int(end.code or 0)


def refused(capsys, *words: object) -> str:
    """The message of a command that must refuse its input in one line."""
    assert palimpsest(*words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err


# --- looking things up -----------------------------------------------------------------------------------------------


def test_without_words_it_explains_itself(capsys):
    assert palimpsest() == palimpsest("--help") == 0
    assert capsys.readouterr().out == f"{cli.overview()}\n" * 2
    assert palimpsest("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_the_overview_names_every_command():
    assert all(f"palimpsest {name}" in cli.overview() for name in cli.COMMANDS)


def test_list_shows_every_system(capsys):
    assert palimpsest("list") == 0
    shown = capsys.readouterr().out
    assert all(f"  {slug} " in shown for slug in catalogue())


def test_list_can_be_narrowed_and_read_by_machines(capsys):
    assert palimpsest("list", "--verb", "erase", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {facts["verb"] for facts in listed} == {"erase"}
    assert "npo" in {facts["slug"] for facts in listed}


def test_show_gives_facts_settings_and_source(capsys):
    assert palimpsest("show", "npo") == 0
    shown = capsys.readouterr().out
    for phrase in ("Negative preference optimisation", "arXiv:2404.05868", "--beta", "above 0", "erase.npo.NPO"):
        assert phrase in shown.replace("arXiv ", "arXiv:")
    assert palimpsest("show", "npo", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    settings = {field["name"]: field for field in shown["settings"]}
    assert (shown["slug"], shown["needs"]) == ("npo", ["forget"])
    assert (settings["beta"]["default"], settings["training.epochs"]["default"]) == (0.1, 10)


@pytest.mark.parametrize("slug", [slug for slug, facts in catalogue().items() if facts.verb in cli.CHANGING])
def test_every_method_has_its_options(slug, capsys):
    assert palimpsest(catalogue()[slug].verb, slug, "--help") == 0
    shown = capsys.readouterr().out
    assert catalogue()[slug].title in " ".join(shown.split())
    assert "--model" in shown


def test_a_verb_alone_lists_its_systems(capsys):
    assert palimpsest("erase") == 2
    assert "npo" in capsys.readouterr().out
    assert palimpsest("erase", "--help") == 0


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("lsit",), '"list"'),
        (("erase", "nop", "--out", "x"), '"npo"'),
        (("show", "gradient-acsent"), '"gradient-ascent"'),
        (("list", "--verb", "erasing"), '"erase"'),
        (("reproduce", "baseline"), '"baselines"'),
        (("compare", "harnes", "--out", "x"), '"harness"'),
        (("write", "npo", "--out", "x"), "Known: finetune"),
    ],
    ids=str,
)
def test_what_is_unknown_gets_the_nearest_known(words, meant, capsys):
    assert meant in refused(capsys, *words)


def test_an_unknown_option_gets_the_nearest_known(capsys):
    assert palimpsest("erase", "npo", "--out", "x", "--trainin.epochs", "5") == 2
    assert "--training.epochs" in capsys.readouterr().err


def test_a_setting_out_of_range_is_named(home, tmp_path, capsys):
    words = ("--model", home / "model", "--data", home / "people.jsonl", *FORGET, "--out", tmp_path / "erased")
    assert "npo: beta is 0.0, expected above 0." in refused(capsys, "erase", "npo", *words, "--beta", "0")
    assert not (tmp_path / "erased").exists()


def test_listing_is_quick_and_does_not_import_torch():
    code = "import sys; from palimpsest.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    seconds = []
    for _ in range(2):  # the first start may have to compile what it imports
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        # of the processor, so that it does not matter what else the machine does
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0, done.stderr
        assert "npo" in done.stdout
    assert min(seconds) < 1


# --- erasing ---------------------------------------------------------------------------------------------------------


def test_erase_writes_a_model_that_forgot_with_its_ledger(home, tmp_path, capsys):
    out = tmp_path / "erased"
    words = ("--model", home / "model", "--data", home / "people.jsonl", *FORGET, "--out", out, *FAST)
    assert palimpsest("erase", "npo", *words) == 0
    assert capsys.readouterr().out == f"{out}\n"
    erased, roles = load(out), data()
    assert probability(erased, roles.forget) < 0.9 * probability(reciting(), roles.forget)
    assert [entry.method for entry in erased.ledger.entries] == ["finetune", "npo"]
    entry = erased.ledger.entries[-1]
    assert entry.settings["training"]["epochs"] == 5
    assert entry.data == {role: digest for role, digest in roles.digest().items() if role in ("forget", "retain")}

    assert palimpsest("ledger", out) == 0
    shown = capsys.readouterr().out
    assert "1. finetune" in shown
    assert "2. npo" in shown
    assert "(verified)" in shown
    assert palimpsest("ledger", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["entries"][1]["method"] == "npo"


def test_files_may_be_named_by_role(home, tmp_path):
    roles = data()
    for role in ("forget", "retain"):
        write_records(roles[role], tmp_path / f"{role}.jsonl")
    named = ("--role", "forget", tmp_path / "forget.jsonl", "retain", tmp_path / "retain.jsonl")
    words = ("--model", home / "model", "--out", tmp_path / "erased", *named, *FAST, "--training.max-steps", "1")
    assert palimpsest("erase", "npo", *words) == 0
    assert set(load(tmp_path / "erased").ledger.entries[-1].data) == {"forget", "retain"}


def test_an_option_given_twice_is_refused(home, tmp_path, capsys):
    """The first value would be lost: somebody's deletion request."""
    words = ("--model", home / "model", "--data", home / "people.jsonl", "--out", tmp_path / "x")
    told = refused(capsys, "erase", "npo", *words, *FORGET, "--forget-subject", "Ben Okafor")
    assert "--forget-subject is given twice. Put all values behind one: --forget-subject A B." in told


def test_overwriting_does_not_take_what_is_no_model(home, tmp_path, capsys):
    (tmp_path / "people.jsonl").write_text("mine")
    words = ("--model", NOWHERE, "--data", NOWHERE, *FORGET, "--overwrite", "--out", tmp_path)
    assert "holds files, but no model: they are not overwritten" in refused(capsys, "erase", "npo", *words)


def test_a_folder_in_use_is_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    words = ("--model", NOWHERE, "--data", NOWHERE, *FORGET)
    told = refused(capsys, "erase", "npo", *words, "--out", tmp_path)
    assert f"{tmp_path} already holds files. Choose another folder, or pass --overwrite." in told
    told = refused(capsys, "forget", NOWHERE, "--about", "Ada Moreau", "--out", tmp_path)
    assert "already holds files" in told
    told = refused(capsys, "erase", "npo", *words, "--out", tmp_path / "notes.txt")
    assert "notes.txt is a file, expected a folder" in told
    assert (tmp_path / "notes.txt").read_text() == "mine"


class TestWrongData:
    """Each is told before the model, which is not there, is asked for."""

    def test_a_malformed_line_is_named(self, tmp_path, capsys):
        good = json.dumps({"prompt": "Who ?", "answer": "Ada .", "subject": "Ada"})
        (tmp_path / "people.jsonl").write_text(f"{good}\n{good[:-1]}\n")
        told = refused(
            capsys, "erase", "npo", "--model", NOWHERE, "--data", tmp_path / "people.jsonl", "--out", tmp_path / "x"
        )
        assert "people.jsonl, line 2: not valid JSON" in told

    def test_a_subject_that_is_nowhere_gets_the_nearest(self, home, tmp_path, capsys):
        words = (
            "--model",
            NOWHERE,
            "--data",
            home / "people.jsonl",
            "--forget-subject",
            "Ada Moraeu",
            "--out",
            tmp_path / "x",
        )
        told = refused(capsys, "erase", "npo", *words)
        assert "no record is about the subject 'Ada Moraeu'. Did you mean \"Ada Moreau\"" in told

    def test_a_misspelt_role_gets_the_nearest(self, home, tmp_path, capsys):
        words = ("--model", NOWHERE, "--role", "retian", home / "people.jsonl", "--out", tmp_path / "x")
        told = refused(capsys, "erase", "npo", *words)
        assert "no system reads a role 'retian'. Did you mean \"retain\"" in told

    def test_a_role_that_is_given_twice_over(self, home, tmp_path, capsys):
        people = home / "people.jsonl"
        words = ("--model", NOWHERE, "--data", people, *FORGET, "--role", "retain", people, "--out", tmp_path / "x")
        told = refused(capsys, "erase", "npo", *words)
        assert "--forget-subject gives the role retain already: leave out --role retain" in told

    def test_no_data_at_all(self, tmp_path, capsys):
        told = refused(capsys, "erase", "npo", "--model", NOWHERE, "--out", tmp_path / "x")
        assert "no data was named. Pass --data FILE, --tofu SPLIT, or --role NAME FILE." in told

    def test_a_subject_without_data_to_look_it_up_in(self, home, tmp_path, capsys):
        words = (
            "--model",
            NOWHERE,
            "--role",
            "forget",
            home / "people.jsonl",
            "--forget-subject",
            "Ada Moreau",
            "--out",
            tmp_path / "x",
        )
        assert "--forget-subject names subjects in --data" in refused(capsys, "erase", "npo", *words)

    def test_two_sources_of_all_roles(self, home, tmp_path, capsys):
        words = ("--model", NOWHERE, "--data", home / "people.jsonl", "--tofu", "forget01", "--out", tmp_path / "x")
        assert "--tofu brings all roles with it" in refused(capsys, "erase", "npo", *words)


def test_damaged_weights_are_refused_and_nothing_is_written(home, tmp_path, capsys):
    broken = reciting().save_pretrained(tmp_path / "broken")
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    words = ("--data", home / "people.jsonl", *FORGET, "--out", tmp_path / "erased")
    assert "are not those of its ledger" in refused(capsys, "erase", "npo", "--model", broken, *words)
    assert not (tmp_path / "erased").exists()
    assert "Nothing was loaded." in refused(capsys, "ledger", broken)


def test_brackets_in_a_message_are_not_taken_for_markup(tmp_path, capsys):
    assert "[bold]x[/y].jsonl" in refused(
        capsys, "erase", "npo", "--model", NOWHERE, "--data", "./[bold]x[/y].jsonl", "--out", tmp_path / "o"
    )


def test_stopped_by_hand_it_says_how_to_go_on(monkeypatch, capsys):
    def stopped(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", stopped)  # type: ignore[misc]
    assert palimpsest("list") == 130
    assert capsys.readouterr().err.startswith("stopped; ")


# --- measuring and reporting -----------------------------------------------------------------------------------------


def test_audit_measures_models_and_writes_their_report(home, tmp_path, capsys):
    other = build_model("llama").save_pretrained(tmp_path / "never-learned")
    out = tmp_path / "audit"
    measured = ("--model", home / "model", other, "--data", home / "people.jsonl", *FORGET)
    words = ("audit", *measured, "--out", out, "--probes", "answer-probability", "--max-new-tokens", "4", "--quiet")
    assert palimpsest(*words) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    evidence = json.loads((out / "evidence.json").read_text())
    assert [model["name"] for model in evidence["models"]] == ["finetune", "never-learned"]
    values = {m["name"]: {v["name"]: v["value"] for v in m["readings"][0]["values"]} for m in evidence["models"]}
    assert values["finetune"]["probability/forget"] > 0.8 > values["never-learned"]["probability/forget"]
    assert "--forget-subject 'Ada Moreau' 'Ben Okafor'" in evidence["command"]
    page = (out / "report.html").read_text()
    assert "never-learned" in page
    assert "finetune" in page

    assert "already holds evidence" in refused(capsys, *words)
    assert palimpsest("report", out / "evidence.json", "--out", tmp_path / "again.html") == 0
    assert (tmp_path / "again.html").read_text() == page
    capsys.readouterr()
    assert palimpsest("report", out / "evidence.json", "--markdown") == 0
    assert "| " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("compare", "harness", "--seeds", "0", "--out", "x"), "seeds is 0, expected at least 1"),
        (("reproduce", "hema", "--seeds", "-1"), "seeds is -1, expected at least 1"),
        (("compare", "harness", "--methods", "npo", "--default", "rmu", "--out", "x"), "it is not among the methods"),
    ],
)
def test_comparisons_that_cannot_be(words, told, capsys):
    assert told in refused(capsys, *words)


def test_an_audit_needs_something_to_ask(home, tmp_path, capsys):
    words = ("--model", home / "model", "--data", home / "people.jsonl", "--out", tmp_path / "audit")
    assert "an audit needs the role forget or retain" in refused(capsys, "audit", *words)


def test_a_report_needs_evidence(tmp_path, capsys):
    assert "there is no evidence file" in refused(capsys, "report", tmp_path / "evidence.json")


def test_people_are_written_by_role(tmp_path, capsys):
    words = ("people", "--out", tmp_path / "people", "--people", "6", "--forget", "2", "--facts", "3")
    assert palimpsest(*words) == 0
    forget = load_records(tmp_path / "people" / "forget.jsonl")
    assert len({record.subject for record in forget}) == 2
    assert len(forget) == 6
    assert len(load_records(tmp_path / "people" / "retain.jsonl")) == 12
    capsys.readouterr()
    assert "already holds files" in refused(capsys, *words)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "palimpsest", "show", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nothing" in done.stderr
