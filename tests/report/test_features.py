"""What the report makes of the probe of features: metrics, plots, verdicts in words."""

from __future__ import annotations

import math

import pytest

from palimpsest.audit.reading import Reading, Value
from palimpsest.report import caveats, page, plots
from palimpsest.report.evidence import Evidence, ModelEvidence, load, save
from palimpsest.report.groups import compare
from palimpsest.report.metrics import metric


def model(name, part, agl, agr, layers, verdict=""):
    values = (Value(name="agl", value=agl, n=40), Value(name="agr", value=agr, n=40))
    arrays = {"cka_gold_by_layer/forget": layers, "layers/forget": ["1", "features"]}
    reading = Reading(probe="truly-forgetting", values=values, arrays=arrays, verdict=verdict)
    return ModelEvidence(name=name, part=part, title=name, readings=(reading,))


EVIDENCE = Evidence(
    title="features",
    models=(
        model("before", "before", 0.0, 0.8, [1.0, 0.5]),
        model("second gold", "control", 1.0, 0.9, [0.9, 0.7]),
        model("masked", "erased", 1.0, 0.8, [1.0, 0.5], "classifier-only: it is all there"),
    ),
)


def test_logits_against_features_with_the_two_controls():
    drawn = page.representations(compare(EVIDENCE))
    assert [plot.title for plot in drawn] == ["Do the features agree, or only the answers?", "Likeness to gold"]
    assert (
        "before: agreement of logits with gold (AGL) 0.00, agreement of features with gold (AGR) 0.80" in drawn[0].svg
    )
    assert "second gold: agreement of logits with gold (AGL) 1.00" in drawn[0].svg
    assert "masked: 1.00, 0.50" in drawn[1].svg


def test_no_features_no_plot():
    assert page.representations(compare(Evidence(title="none", models=()))) == ()
    assert plots.likeness(compare(EVIDENCE), "before", "likeness") is None


def test_a_layer_without_a_number_is_a_gap():
    broken = Evidence(title="", models=(model("flat", "erased", 0.1, math.nan, [math.nan, 0.4]),))
    assert "flat: none, 0.40" in plots.likeness(compare(broken), "gold", "likeness")


def test_the_verdict_in_words_is_kept_and_told(tmp_path):
    save(EVIDENCE, tmp_path / "evidence.json")
    found = caveats.caveats(load(tmp_path / "evidence.json"))
    (words,) = (caveat for caveat in found if caveat.title == "What the probes say in words")
    assert words.items == ("masked, seed 0: classifier-only: it is all there",)


@pytest.mark.parametrize(
    ("name", "better", "section"),
    [
        ("agl", "higher", "Forgetting"),
        ("cka_gold/forget", "higher", "Forgetting"),
        ("knn/downstream_birds", "gold", "Other"),
        ("logit/retain", "gold", "What must stay"),
        ("kl/forget", "lower", "Forgetting"),
        ("probability/forget", "lower", "Forgetting"),
        ("gain/forget", "none", "Other"),
    ],
)
def test_every_value_has_its_direction_and_place(name, better, section):
    assert (metric(name).better, metric(name).section) == (better, section)
