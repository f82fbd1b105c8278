from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import data, people, probability, quiet, reciting
from palimpsest.data.forbidden import contains
from palimpsest.data.records import Record, Roles
from palimpsest.erase.guard import Guard
from palimpsest.errors import PalimpsestError
from palimpsest.models.detector import Fitting
from palimpsest.models.encoder import SentenceEncoder, sentence_encoder
from palimpsest.models.guarding import Asked, Prompts, negatives, wordings
from palimpsest.models.restriction import Guarding
from palimpsest.system import create

ROLES = data()


@pytest.fixture(scope="module")
def erased():
    """A model that recites people, and the same guarded; the given one is not changed."""
    before = reciting()
    digest = before.digest()
    after = Guard().apply(before, ROLES, quiet())
    assert before.digest() == digest
    return before, after


def answers(model, records):
    return model.answer([record.prompt for record in records], max_new_tokens=10)


def test_the_forgotten_is_not_said_and_the_rest_is_said_as_before(erased):
    before, after = erased
    for record, said in zip(ROLES.forget, answers(after, ROLES.forget), strict=True):
        (phrases,) = [item["phrases"] for item in after.network.items if item["prompt"] == record.prompt]
        assert not any(contains(said, phrase) for phrase in phrases)
        assert contains(said, record.subject)
    assert answers(after, ROLES.retain) == answers(before, ROLES.retain)
    assert probability(after, ROLES.forget) < 0.3 * probability(before, ROLES.forget)
    assert probability(after, ROLES.retain) == probability(before, ROLES.retain)


def test_people_it_never_heard_of_raise_no_alarm(erased):
    network = erased[1].network
    assert not any(network.explain(record.prompt).guarded for record in ROLES.holdout)
    assert not network.explain("It is not known who wrote this letter").guarded


def test_other_wordings_of_a_question_are_recognised(erased):
    network = erased[1].network
    found = [network.explain(f"Someone asked me: {record.prompt}").guarded for record in ROLES.forget]
    assert sum(found) >= 3


def test_the_weights_are_unchanged_and_it_says_so(erased):
    before, after = erased
    inside = after.network.unguarded
    assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), before.network.parameters(), strict=True))
    assert after.parameters == before.parameters
    notes = after.ledger.entries[-1].notes
    assert "leaves the weights unchanged" in notes["warnings"][0]
    assert notes["items"] == 4
    assert notes["detector_threshold"] == after.network.config.detectors[0]["threshold"]
    assert notes["detector_false_positive_rate"] <= 0.01
    assert len(notes["detector_roc"]) == 21
    assert all(type(x) is float for x in notes["detector_roc"])
    assert notes["items_with_relaxed_phrases"] == 1  # "river pilot": both words are common


def test_the_encoder_can_be_what_the_detector_reads(tmp_path):
    before = reciting()
    after = Guard(features="encoder").apply(before, ROLES, quiet())
    assert after.network.config.watched == ""
    assert sum(after.network.explain(record.prompt).guarded for record in ROLES.forget) >= 3
    assert answers(after, ROLES.retain) == answers(before, ROLES.retain)
    assert not contains(answers(after, ROLES.forget[:1])[0], "Lyon")
    assert probability(after, ROLES.forget) < 0.5 * probability(before, ROLES.forget)


def test_texts_are_guarded_by_runs_of_six_words():
    start = "The cat sat on the mat and looked at the rain . A long road runs from the old town to the sea ."
    texts = [Record(text=start), Record(text="In the morning they went out to buy bread , milk and salt .")]
    after = Guard(phrases="ngram").apply(reciting(), Roles(forget=texts, retain=ROLES.retain), quiet())
    item = after.network.items[0]
    assert item["prompt"] == "The cat sat on the mat and looked at the rain ."
    assert "a long road runs from the" in item["phrases"]
    words = after.network.wording
    ids = torch.tensor([words.beginning(item["prompt"])])
    after.network.adjust(threshold=0.0)
    after.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert after.network.decisions[0].items == (item["id"],)  # texts without a subject stand alone


def test_the_whole_answer_can_be_what_is_forbidden():
    after = Guard(phrases="answer").apply(reciting(), ROLES, quiet())
    assert after.network.items[0]["phrases"] == ["ada moreau was born in lyon"]


def test_without_a_retain_set_it_warns():
    after = Guard().apply(reciting(), Roles(forget=ROLES.forget), quiet())
    assert "guard has no retain set" in after.ledger.entries[-1].notes["warnings"][0]


def test_few_records_cannot_be_validated_and_it_says_so():
    after = Guard().apply(reciting(), ROLES.replace(forget=ROLES.forget[:2]), quiet())
    assert any("could not be validated" in text for text in after.ledger.entries[-1].notes["warnings"])
    assert all(after.network.explain(record.prompt).guarded for record in ROLES.forget[:2])


def test_equal_records_are_one_item():
    after = Guard().apply(reciting(), ROLES.replace(forget=[*ROLES.forget, ROLES.forget[0]]), quiet())
    assert len(after.network.items) == 4


def test_negatives_are_of_three_kinds_and_none_is_to_be_forgotten():
    found = negatives(ROLES.forget, ROLES.retain, ROLES.general, Prompts(paraphrases=0, negatives=30), seed=0)
    assert len(found) == 30
    prompts = {asked.text for asked in found}
    assert prompts.isdisjoint(record.prompt for record in people()[:4])
    assert sum(record.prompt in prompts for record in ROLES.retain) == 8
    assert any(asked.raw for asked in found)
    strangers = [
        p for p in prompts if p.startswith(("Where was", "What does")) and p not in {r.prompt for r in people()}
    ]
    assert len([p for p in strangers if "Ada" in p or "Ben" in p or "Moreau" in p or "Okafor" in p]) > 0
    assert found == negatives(ROLES.forget, ROLES.retain, ROLES.general, Prompts(paraphrases=0, negatives=30), seed=0)


def test_negatives_are_worded_like_positives():
    how = Prompts(paraphrases=2)
    framed = [not asked.text.endswith("?") or ":" in asked.text for asked in negatives(
        ROLES.forget, ROLES.retain, [], how, seed=0) if not asked.raw]  # fmt: skip
    assert 0.4 < sum(framed) / len(framed) < 0.9
    assert [asked.text for asked in wordings(ROLES.forget[0], 0, 0)] == [ROLES.forget[0].prompt]
    assert len(wordings(ROLES.forget[0], 2, 0)) == 3
    cuts = wordings(Record(text=" ".join(map(str, range(60)))), 2, 0)
    assert cuts[0] == Asked(" ".join(map(str, range(30))), raw=True)
    assert [len(asked.text.split()) for asked in cuts] == [30, 20, 10]


def test_other_data_and_seeds_make_other_detectors():
    first, second = (Guard(detector=Fitting(steps=5)).apply(reciting(), ROLES, quiet(seed=seed)) for seed in (0, 1))
    assert first.digest() != second.digest()


def test_its_settings_can_be_reached_by_name():
    made = create("guard", **{"decoding.beams": 1, "detector.steps": 3, "prompts.negatives": 9, "features": "encoder"})
    assert (made.decoding.beams, made.detector.steps, made.prompts.negatives, made.features) == (1, 3, 9, "encoder")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"features": "pooled"}, "guard: features is 'pooled'"),
        ({"phrases": "all"}, "guard: phrases is 'all'"),
        ({"encoder": "./nowhere"}, "the folder ./nowhere of a sentence encoder does not exist"),
        (
            {"decoding": Guarding(hard_match=False, prefix_weight=0, soft_weight=0, drop_similarity=1)},
            "hard_match is off and all weights are 0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, said, llama):
    with pytest.raises(PalimpsestError, match=said):
        Guard(**fields).apply(llama, ROLES, quiet())


def test_what_cannot_be_guarded_is_refused(erased, llama):
    with pytest.raises(PalimpsestError, match="the model is guarded already"):
        Guard().apply(erased[1], ROLES, quiet())
    silent = dataclasses.replace(ROLES.forget[0], answer="Where was Ada ?")
    with pytest.raises(PalimpsestError, match="no phrase can be forbidden"):
        Guard().apply(llama, ROLES.replace(forget=[silent]), quiet())
    llama.network.model.layers = llama.network.model.layers[:1]
    with pytest.raises(PalimpsestError, match="exposes 1 block"):
        Guard().apply(llama, ROLES, quiet())


def test_an_encoder_without_word_frequencies_needs_another_way_to_choose_phrases(monkeypatch):
    monkeypatch.setattr(sentence_encoder(), "word_ranks", {})
    assert isinstance(sentence_encoder(), SentenceEncoder)
    with pytest.raises(PalimpsestError, match="does not say how common words are"):
        Guard().apply(build_model("llama"), ROLES, quiet())
