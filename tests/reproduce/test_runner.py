from __future__ import annotations

import dataclasses
import json
import math
import re
from xml.etree import ElementTree

import pytest

from palimpsest import cli
from palimpsest.audit.reading import Reading, Value
from palimpsest.errors import PalimpsestError
from palimpsest.report.evidence import Evidence, ModelEvidence
from palimpsest.reproduce import baselines
from palimpsest.reproduce.runner import HELPERS, Check, Figure, Outcome, Reproduction, draw, find, markdown, names
from palimpsest.tasks import BASELINES


def outcome(*verdicts: str) -> Outcome:
    checks = [Check(expected="more", found=f"{number} against 0", verdict=v) for number, v in enumerate(verdicts)]
    return Outcome(rows=[{"model": "npo", "utility": 0.51234}, {"model": "before", "utility": 1}], checks=checks)


def test_every_reproduction_is_complete():
    assert "baselines" in names()
    assert not {name.replace("-", "_") for name in names()} & set(HELPERS)
    assert not any("_" in name for name in names())
    for name in names():
        found = find(name)
        assert isinstance(found, Reproduction)
        assert found.claim.endswith(".")
        assert all((found.source, found.setting, found.paper))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(PalimpsestError, match=r"there is no reproduction 'base-lines'\. Did you mean .baselines"):
        find("base-lines")
    with pytest.raises(PalimpsestError, match="there is no reproduction 'runner'"):
        find("runner")


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (("holds", "holds"), "holds"),
        (("holds", "inconclusive"), "inconclusive"),
        (("holds", "inconclusive", "does not hold"), "does not hold"),
        ((), "inconclusive"),
    ],
    ids=str,
)
def test_a_claim_holds_where_every_part_holds(verdicts, whole):
    assert outcome(*verdicts).verdict == whole


def test_the_page_has_claim_table_and_verdict():
    page = markdown(find("baselines"), outcome("holds", "does not hold"), 12.4, (0, 1, 2))
    lines = page.splitlines()
    assert lines[0].startswith("**Claim.** Gradient ascent forgets")
    assert "Seeds 0, 1, 2; 12 s." in page
    start = lines.index("| model | utility |")
    assert lines[start + 1 : start + 4] == ["|---|---|", "| npo | 0.512 |", "| before | 1 |"]
    assert "| more | 1 against 0 | does not hold |" in lines
    assert lines[-1] == "**Verdict: does not hold.**"


def test_the_command_keeps_the_result_and_prints_it(tmp_path, capsys, monkeypatch):
    told = Reproduction(
        claim="Less is less.", source="us", setting="Here.", paper="1", measure=lambda *_: outcome("holds")
    )
    monkeypatch.setattr(baselines, "REPRODUCTION", told)
    assert cli.main(["reproduce", "baselines", "--out", str(tmp_path), "--seeds", "2", "--json", "--quiet"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verdict"], shown["claim"]) == ("holds", "Less is less.")
    assert shown == json.loads((tmp_path / "baselines" / "result.json").read_text())
    assert "**Claim.** Less is less. (us)" in (tmp_path / "baselines" / "result.md").read_text()


# --- the verdicts on the baselines -----------------------------------------------------------------------------------

NAMES = {"forget": "probability/forget", "utility": "model_utility", "world": "probability/world"}
MEASURED = {
    "before": {"forget": 0.9, "utility": 0.6, "world": 0.9},
    "gradient-ascent": {"forget": 0.0, "utility": 0.1, "world": 0.2},
    "npo": {"forget": 0.2, "utility": 0.5, "world": 0.8},
    "po": {"forget": 0.7, "utility": 0.55, "world": 0.9},
    "retain-finetune": {"forget": 0.8, "utility": 0.6, "world": 0.9},
}


def measured(*seeds: dict[str, dict[str, float]]) -> Evidence:
    """Evidence in which each seed has the usual numbers but for the given ones; None: the probe gave nothing."""
    models = []
    for seed, changes in enumerate(seeds):
        for name, usual in MEASURED.items():
            numbers = {key: value for key, value in (usual | changes.get(name, {})).items() if value is not None}
            values = tuple(
                Value(name=NAMES[key], value=value, n=1, low=None, high=None, better="higher")
                for key, value in numbers.items()
            )
            part = "before" if name == "before" else "erased"
            readings = (Reading(probe="made by hand", values=values),)
            models.append(ModelEvidence(name=name, part=part, title=name, seed=seed, readings=readings))
    return Evidence(title="by hand", models=tuple(models))


def verdicts(evidence: Evidence) -> list[str]:
    return [check.verdict for check in baselines.judge(evidence).checks]


def test_the_expected_order_holds():
    found = baselines.judge(measured({}, {}, {}))
    assert found.verdict == "holds"
    assert [row["model"] for row in found.rows] == list(MEASURED)
    assert found.rows[0]["utility"] == "0.60 ± 0.00"
    assert found.rows[0]["robustness"] == "-"


def test_each_part_can_fail_on_its_own():
    ascent, npo = "gradient-ascent", "npo"
    assert verdicts(measured({ascent: {"utility": 0.4}})) == ["does not hold", *["holds"] * 4]
    assert verdicts(measured({ascent: {"world": 0.85}})) == ["holds", "does not hold", *["holds"] * 3]
    assert verdicts(measured({npo: {"utility": 0.05}})) == [*["holds"] * 2, "does not hold", *["holds"] * 2]
    assert verdicts(measured({npo: {"forget": 0.75}})) == [*["holds"] * 3, "does not hold", "holds"]
    assert verdicts(measured({npo: {"forget": 0.95}})) == [*["holds"] * 3, "does not hold", "does not hold"]


def test_seeds_that_disagree_decide_nothing():
    assert verdicts(measured({}, {"gradient-ascent": {"utility": 0.4}}))[0] == "inconclusive"


@pytest.mark.parametrize("missing", [None, math.nan], ids=["failed probe", "no number"])
def test_a_value_that_is_missing_decides_nothing(missing):
    lost = {"gradient-ascent": {"utility": missing}}
    for evidence in (measured(lost), measured({}, lost)):
        assert verdicts(evidence)[0] == verdicts(evidence)[2] == "inconclusive"


def test_a_tie_is_no_more():
    assert verdicts(measured({"npo": {"utility": 0.1}}))[2] == "does not hold"


def test_the_claim_only_speaks_of_methods_that_are_compared():
    assert set(MEASURED) - {"before"} <= set(BASELINES)


def test_figures_stand_on_the_page_and_beside_it(tmp_path):
    figure = Figure(name="plane", across="steps", up="loss", lines={"npo": ([1, 2], [3.0, 1.0]), "gold": ([2], [0.5])})
    drawn = dataclasses.replace(outcome("holds"), figures=(figure,))
    reproduction = Reproduction(claim="It.", source="s", setting="t", paper="p", measure=lambda *_: drawn)
    assert "![loss against steps](plane.svg)" in markdown(reproduction, drawn, 1.0, [0])
    draw(drawn.figures, tmp_path)
    root = ElementTree.parse(tmp_path / "plane.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "npo: lowest 1 at 2, highest 3 at 1; gold" in root.attrib["aria-label"]
    written = (tmp_path / "plane.svg").read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--[\w-]+)\)", written))
    assert used, "colours are variables"
    assert all(f"{name}:" in written for name in used), "and the file says what they are"
