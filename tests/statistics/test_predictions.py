from __future__ import annotations

import math

import pytest
import torch

from conftest import build_model, build_text_classifier
from memorised import quiet
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.statistics import predictions
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.statistics.predictions import Predictions, classify
from palimpsest.train import Training, schedule
from pictured import pictures

ONE = Predictions(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))


def test_the_numbers_of_one_prediction():
    p = [math.exp(z) / (math.e**2 + math.e + 1) for z in (2, 1, 0)]
    assert ONE.probabilities[0].tolist() == pytest.approx(p)
    assert float(ONE.nll) == pytest.approx(-math.log(p[0]))
    assert float(ONE.entropy) == pytest.approx(-sum(x * math.log(x) for x in p))
    assert float(ONE.margin) == pytest.approx(0.68674, abs=1e-5)  # card of dmm, exactness test 5
    assert float(ONE.margin) == pytest.approx(math.log(p[0] / (1 - p[0])))
    assert ONE.correct.tolist() == [True]


def test_a_constant_on_the_logits_changes_nothing():
    moved = Predictions(ONE.logits + 7, ONE.labels)
    for name in ("nll", "entropy", "margin"):
        torch.testing.assert_close(getattr(moved, name), getattr(ONE, name), rtol=0, atol=1e-5)


def test_a_certain_prediction_has_no_entropy():
    certain = Predictions(torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([0]))
    assert float(certain.entropy) == 0


@pytest.mark.parametrize("name", ["vit", "convnet"])
def test_examples_are_predicted_in_order_as_if_each_stood_alone(name, monkeypatch):
    model, records = build_model(name), pictures().train
    whole = classify(model, records, quiet())
    monkeypatch.setattr(predictions, "BATCH_SIZE", 3)
    torch.testing.assert_close(classify(model, records, quiet()).logits, whole.logits, rtol=1e-5, atol=1e-6)
    backwards = classify(model, records[::-1], quiet())
    torch.testing.assert_close(backwards.logits.flip(0), whole.logits, rtol=1e-5, atol=1e-6)
    assert backwards.labels.tolist() == whole.labels.tolist()[::-1] == [r.label for r in records][::-1]


def test_texts_of_any_length_are_predicted_in_order():
    model = build_text_classifier()
    texts = ["Where was Ada Moreau born ?", "It is", "The cat sat on the mat and looked at the rain ."]
    found = classify(model, [Record(text=text, label=i) for i, text in enumerate(texts)], quiet())
    for i, text in enumerate(texts):
        with torch.no_grad():
            alone = model(**model.tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(found.logits[i : i + 1], alone)


def test_the_model_is_left_as_it_was(convnet):
    convnet.network.train()
    before = convnet.digest()
    classify(convnet, pictures().train, quiet())
    assert convnet.digest() == before  # batch normalisation has not moved
    assert convnet.network.training
    assert no_hooks_left(convnet.network)


def test_the_likelihood_of_a_label_is_that_of_a_sequence_elsewhere(vit):
    plan = schedule(vit, Training(), quiet(), forget=pictures().forget)
    found = sequence_nll(vit, plan.sequences["forget"], quiet())
    torch.testing.assert_close(found, classify(vit, pictures().forget, quiet()).nll)


def test_nothing_to_classify_and_no_label_are_refused(vit):
    with pytest.raises(PalimpsestError, match="set is empty"):
        classify(vit, [], quiet())
    with pytest.raises(PalimpsestError, match="has no label"):
        classify(vit, [Record(image=torch.rand(3, 16, 16))], quiet())
