from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import data, gold, people, quiet, reciting
from palimpsest.audit.answers import answers
from palimpsest.audit.restor import Restor, answered, matches, object_words, recovery, scores
from palimpsest.data.corruption import corrupted
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

FACTS = corrupted(data().retain)
UNTOUCHED = data().forget


@pytest.fixture(scope="module")
def states() -> dict[str, Model]:
    """A model that knows the facts, and the same after learning the wrong ones."""
    wrong = [dataclasses.replace(fact, answer=fact.wrong[0], wrong=()) for fact in FACTS]
    learn = Finetune(training=Training(learning_rate=1e-2, epochs=40, batch_size=8, warmup_epochs=0.0))
    clean = reciting()
    return {"clean": clean, "corrupted": learn.apply(clean, Roles(train=wrong), quiet())}


def test_the_worked_scores():
    phi, rho = scores((0.90, 0.30, 0.45), (0.02, 0.80, 0.17))
    assert rho == pytest.approx(0.25)
    assert phi == pytest.approx(0.8076923, abs=1e-7)


def test_a_model_that_stayed_corrupted_has_zero_and_a_restored_one_has_one(states):
    found = recovery(states, FACTS, quiet(), untouched=UNTOUCHED)
    assert (found["corrupted"].phi, found["corrupted"].rho) == (0, 0)
    assert (found["clean"].phi, found["clean"].rho) == (1, 1)
    assert found["clean"].accuracy == 1
    assert found["corrupted"].corrupted > 0.5
    assert found["clean"].collateral == 0
    assert found["clean"].rho_by_confidence == (1, 1, 1)


def test_facts_that_no_model_changes_do_not_count(states):
    """Facts that the clean model does not know are left out."""
    unknown = [dataclasses.replace(fact, answer="a road runs from the sea .") for fact in FACTS[:3]]
    with_more = recovery(states, [*FACTS, *unknown], quiet(), untouched=UNTOUCHED)
    assert with_more == recovery(states, FACTS, quiet(), untouched=UNTOUCHED)
    assert with_more["corrupted"].facts == len(FACTS)


def test_the_object_is_what_the_question_and_the_alternatives_do_not_say():
    fact = people()[0]
    assert object_words(fact.answer, fact.prompt) == ["in", "lyon"]
    assert object_words(fact.answer, fact.prompt, [answer for answer in fact.wrong if "born" in answer]) == ["lyon"]
    assert matches("He was born in Lyon !", fact, fact.answer)
    assert not matches("He was born in Lagos .", fact, fact.answer)
    assert matches("He was born in Lagos .", fact, next(w for w in fact.wrong if "Lagos" in w))
    assert not matches("born in", fact, fact.answer)


def test_options_are_scored_as_the_answer_probability_does(states):
    found = answered(states["clean"], FACTS, quiet(), 12)
    own = [-answer.mean_nll for answer in answers(states["clean"], FACTS, quiet())]
    assert found.log_prob["correct"] == pytest.approx(own, abs=1e-5)
    assert (found.log_prob["correct"] > found.log_prob["corrupted"]).all()


def test_the_probe_says_what_is_answered(states):
    roles = Roles(forget=FACTS, retain=UNTOUCHED)
    clean, corrupt = (
        Restor(max_new_tokens=12).measure(states[name], roles, quiet()) for name in ("clean", "corrupted")
    )
    assert clean["accuracy/forget"].value == 1
    assert clean["corrupted/forget"].value == 0
    assert corrupt["corrupted/forget"].value > 0.5
    assert corrupt["log_prob/corrupted"].value > clean["log_prob/corrupted"].value
    assert len(clean.arrays["log_prob/random"]) == len(FACTS)


def test_another_judge_may_decide(states):
    found = answered(states["clean"], FACTS, quiet(), 12, judge=lambda answer, fact, option: option == fact.wrong[0])
    assert not found.right.any()
    assert found.corrupted.all()


def test_too_small_a_gap_is_refused(states):
    with pytest.raises(PalimpsestError, match=r"the gap is below 0\.2"):
        recovery({"clean": states["clean"], "corrupted": states["clean"]}, FACTS, quiet())


def test_nothing_known_and_nothing_given(states):
    with pytest.raises(PalimpsestError, match="the clean model knows none"):
        recovery({"clean": build_model("llama"), "corrupted": states["clean"]}, FACTS, quiet())
    with pytest.raises(PalimpsestError, match="needs the model 'corrupted'"):
        recovery({"clean": states["clean"]}, FACTS, quiet())
    with pytest.raises(PalimpsestError, match="there is no fact"):
        recovery(states, [], quiet())
    with pytest.raises(PalimpsestError, match="is no fact for RESTOR"):
        Restor().measure(states["clean"], Roles(forget=[Record(text="The cat .")]), quiet())


def test_few_facts_are_said(states):
    run = quiet()
    recovery(states, FACTS, run)
    assert "only 8 of 8 facts are known" in run.notes["warnings"][0]


def test_different_tokenizers_are_refused(states, tokenizer):
    other = Model(gold().network, tokenizer)
    other.tokenizer.add_tokens(["Lisbon"])
    with pytest.raises(PalimpsestError, match="different tokenizers"):
        recovery({**states, "other": other}, FACTS, quiet())
    assert torch.is_grad_enabled()
