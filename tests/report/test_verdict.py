import dataclasses

import pytest
from report_example import full, model, small, with_seeds

from palimpsest.report.evidence import Evidence
from palimpsest.report.groups import compare
from palimpsest.report.sentences import about, percent
from palimpsest.report.verdict import verdict


def test_a_good_erasure_says_so_with_the_numbers():
    found = verdict(small())
    assert (found.outcome, found.tone) == ("forgotten", "good")
    assert found.headline == "The model no longer recites what it had learned about Ilse Varga and Tomaso Kerr."
    assert found.sentences[0] == (
        "It repeated 0.95 of each answer before, 0.31 (0.26 to 0.36) after; a model that never saw them repeats 0.29."
    )
    assert "no better than chance (AUC 0.52, 0.47 to 0.57)" in found.sentences[1]
    assert found.sentences[2] == "Nothing else that was measured got worse."
    assert [figure.tone for figure in found.figures] == ["good"] * 4


CASES = {
    "not forgotten": ({"rouge/forget": 0.8}, {}, {}, "still recites"),
    "partly forgotten": ({"rouge/forget": 0.5}, {}, {}, "recites less of"),
    "wrecked": ({"model_utility": 0.3}, {}, {}, "lost much of everything else"),
    "damaged": ({"model_utility": 0.53}, {}, {}, "at a price: it kept 88 %"),
    "collapsed": ({"gibberish/forget": 0.9, "rouge/forget": 0.2}, {}, {}, "only because it answers in gibberish"),
    "still found": ({"auc/min-k": 0.8}, {}, {}, "an attacker can still tell"),
    "over-forgotten": ({"rouge/forget": 0.05}, {}, {}, "the erasure went too far"),
    "hidden": ({"probability/forget": 0.58}, {}, {}, "but it still knows it"),
    "returns": ({"robustness": 0.25}, {}, {}, "quickly taught again"),
    "told apart": ({"forget_quality": 1e-4}, {}, {}, "can still be told from a model that never saw them"),
    "nothing to forget": ({}, {"rouge/forget": 0.3, "probability/forget": 0.1}, {}, "There was nothing to forget"),
}


@pytest.mark.parametrize("outcome", CASES)
def test_every_bad_case_is_called_by_its_name(outcome):
    after, before, gold, words = CASES[outcome]
    found = verdict(small(after, before=before, gold=gold or None))
    assert found.outcome == outcome
    assert found.tone != "good"
    assert words in found.headline


def test_a_test_that_the_model_before_passes_too_says_nothing_good():
    quality = verdict(small({"forget_quality": 0.33}, before={"forget_quality": 0.33})).figures[3]
    assert quality.tone == "mixed"
    assert "too few records" in quality.note


def test_two_models_of_one_method_have_two_titles():
    example = small()
    before, erased, gold = example.models
    twin = dataclasses.replace(erased, name="npo, other")
    found = compare(dataclasses.replace(example, models=(before, erased, twin, gold)))
    assert len({group.title for group in found.all()}) == 4


def test_what_recall_cannot_see_is_judged_by_a_value_that_can():
    found = verdict(small(before={"rouge/forget": 0.35}))
    assert found.outcome == "forgotten"
    assert found.sentences[0].startswith("It gave the answers a probability of 0.9")
    assert verdict(small({"probability/forget": 0.9}, before={"rouge/forget": 0.35})).outcome == "not forgotten"


@pytest.mark.parametrize(
    ("symptom", "words"),
    [("refusals/forget", "because it refuses to answer"), ("repetition/forget", "because it repeats itself")],
)
def test_refusing_and_repeating_are_not_forgetting(symptom, words):
    assert words in verdict(small({symptom: 0.8})).headline


def test_refusing_as_often_as_gold_is_no_collapse():
    assert verdict(small({"refusals/forget": 0.8}, gold={"refusals/forget": 0.75})).outcome == "forgotten"


def test_a_rise_in_perplexity_alone_is_a_wreck():
    found = verdict(small({"perplexity/general": 90.0}, before={"perplexity/general": 18.0}))
    assert found.outcome == "wrecked"
    assert any("5.0 times" in sentence for sentence in found.sentences)


def test_a_model_less_familiar_with_the_records_than_chance_went_too_far():
    found = verdict(small({"auc/min-k": 0.2}))
    assert found.outcome == "over-forgotten"
    assert any("less familiar" in sentence for sentence in found.sentences)


def test_an_attack_other_than_the_quoted_one_is_named():
    found = verdict(small({"auc/reference": 0.9}))
    assert found.outcome == "still found"
    assert any("(reference) reaches an AUC of 0.90" in sentence for sentence in found.sentences)


def test_an_attack_that_also_finds_them_in_gold_is_no_alarm():
    found = verdict(small({"auc/min-k": 0.72}, gold={"auc/min-k": 0.70}))
    assert found.outcome == "forgotten"
    assert "no better than in a model that never saw it" in found.sentences[1]


def test_a_wide_interval_is_admitted():
    wide = small()
    models = []
    for one in wide.models:
        reading = one.readings[0]
        values = tuple(
            dataclasses.replace(v, low=0.3, high=0.75) if v.name == "auc/min-k" else v for v in reading.values
        )
        models.append(dataclasses.replace(one, readings=(dataclasses.replace(reading, values=values),)))
    sentence = verdict(dataclasses.replace(wide, models=tuple(models))).sentences[1]
    assert sentence.endswith("with 20 examples that is a rough figure.")


def test_without_gold_nothing_is_proved():
    found = verdict(small({"rouge/forget": 0.2}, gold={}))
    assert found.outcome == "no gold"
    assert "nothing proves that it forgot" in found.headline
    assert "never saw them repeats" not in found.sentences[0]


def test_too_few_examples_prove_nothing():
    found = verdict(small(n=4))
    assert (found.outcome, found.tone) == ("too few", "mixed")
    assert found.headline.startswith("On 4 examples")


def test_an_interval_that_reaches_halfway_back_proves_nothing():
    evidence = small()
    before, after, gold = evidence.models
    (reading,) = after.readings
    values = tuple(dataclasses.replace(v, high=0.7) if v.name == "rouge/forget" else v for v in reading.values)
    after = dataclasses.replace(after, readings=(dataclasses.replace(reading, values=values),))
    assert verdict(dataclasses.replace(evidence, models=(before, after, gold))).outcome == "too few"


def test_a_gold_model_whose_recall_failed_proves_nothing():
    evidence = small({"rouge/forget": 0.2})
    before, after, gold = evidence.models
    gold = dataclasses.replace(gold, readings=())
    found = verdict(dataclasses.replace(evidence, models=(before, after, gold)))
    assert found.outcome == "no gold"


def test_several_faults_give_the_gravest_headline_and_all_sentences():
    found = verdict(small({"gibberish/forget": 0.9, "model_utility": 0.1, "robustness": 0.2}, n=5))
    assert [finding.kind for finding in found.findings][:2] == ["collapsed", "wrecked"]
    assert {"returns", "too few"} < {finding.kind for finding in found.findings}


def test_a_partly_forgotten_wreck_does_not_claim_that_it_forgot():
    assert "recites less of" in verdict(small({"rouge/forget": 0.5, "model_utility": 0.1})).headline


@pytest.mark.parametrize("missing", [("before",), ("erased",), ("before", "erased", "gold")])
def test_missing_models_cannot_be_judged(missing):
    evidence = small()
    kept = tuple(one for one in evidence.models if one.part not in missing)
    found = verdict(dataclasses.replace(evidence, models=kept))
    assert found.outcome == "unmeasured"
    assert found.headline.startswith("Whether the model has forgotten")


def test_failed_recall_falls_back_to_another_measure():
    models = (
        model("before", {"probability/forget": 0.9}),
        model("erased", {"probability/forget": 0.1}),
        model("gold", {"probability/forget": 0.1}),
    )
    found = verdict(Evidence(title="t", models=models))
    assert found.outcome == "forgotten"
    assert "probability of 0.90 before, 0.10" in found.sentences[0]
    assert [figure.value for figure in found.figures[1:]] == ["\N{EM DASH}"] * 3


def test_the_default_method_is_judged_and_without_one_the_first():
    assert verdict(dataclasses.replace(full(), default="idk-dpo")).judged == "IdkDPO"
    assert verdict(dataclasses.replace(full(), default=None)).judged == "NPO"
    assert verdict(dataclasses.replace(full(), default="gradient-ascent")).outcome == "collapsed"
    assert verdict(dataclasses.replace(full(), default="idk-dpo")).tone == "bad"


def test_three_seeds_give_students_interval():
    evidence = with_seeds(small(), (-0.01, 0.0, 0.01))
    recalled = compare(evidence).after.get("rouge/forget")
    assert (recalled.seeds, recalled.over) == (3, "seeds")
    assert recalled.value == pytest.approx(0.31)
    assert recalled.high - recalled.value == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)


def test_two_seeds_join_their_intervals_over_examples():
    recalled = compare(with_seeds(small(), (-0.02, 0.02))).after.get("rouge/forget")
    assert (recalled.value, recalled.low, recalled.high) == pytest.approx((0.31, 0.26, 0.36))
    assert recalled.over == "examples"


def test_names_are_listed_without_end():
    evidence = full()
    role = dataclasses.replace(evidence.data.roles["forget"], subjects=("A", "B", "C", "D"))
    many = dataclasses.replace(evidence, data=dataclasses.replace(evidence.data, roles={"forget": role}))
    assert about(many) == "A, B and 2 others"
    assert about(dataclasses.replace(evidence, data=Evidence(title="", models=()).data)) == "the erased records"


def test_percentages_have_a_digit_below_ten():
    assert (percent(0.018), percent(0.0997), percent(0.5)) == ("1.8 %", "10 %", "50 %")


def test_a_measure_that_saw_nothing_before_cannot_show_that_it_is_still_there():
    blind = {"knowledge_memory/forget": 0.11}
    found = verdict(small({"knowledge_memory/forget": 0.21}, before=blind, gold={"knowledge_memory/forget": 0.06}))
    assert found.outcome == "forgotten"
    seeing = {"knowledge_memory/forget": 0.8}
    found = verdict(small({"knowledge_memory/forget": 0.6}, before=seeing, gold={"knowledge_memory/forget": 0.06}))
    assert found.outcome == "hidden"


def classifier(after: float, kept: float = 0.97, member: float = 0.02) -> Evidence:
    """A classifier before, erased and never taught the class, on 30 erased images."""
    numbers = {
        "before": {"accuracy/forget": 1.0, "accuracy/test": 0.98, "member/forget": 0.8, "auc/loss": 0.9},
        "erased": {"accuracy/forget": after, "accuracy/test": kept, "member/forget": member, "auc/loss": 0.52},
        "gold": {"accuracy/forget": 0.0, "accuracy/test": 0.98, "member/forget": 0.01, "auc/loss": 0.5},
    }
    models = tuple(model(name, values, n=30) for name, values in numbers.items())
    return dataclasses.replace(small(), models=models)


def test_a_classifier_recognises_instead_of_reciting():
    found = verdict(classifier(0.03))
    assert found.outcome == "forgotten"
    assert found.headline == "The model no longer recognises Ilse Varga and Tomaso Kerr."
    assert found.sentences[0].startswith("It was right about 1.00 of the erased records before, 0.03")
    assert found.figures[0].label == "recognition of what was erased"


@pytest.mark.parametrize(
    ("evidence", "outcome", "words"),
    [
        (classifier(0.9), "not forgotten", "still recognises"),
        (classifier(0.4), "partly forgotten", "recognises less of"),
        (classifier(0.0, kept=0.4), "wrecked", "lost much of everything else"),
    ],
    ids=["kept", "partly", "wrecked"],
)
def test_a_classifier_is_judged_by_the_same_rules(evidence, outcome, words):
    found = verdict(evidence)
    assert found.outcome == outcome
    assert words in found.headline
