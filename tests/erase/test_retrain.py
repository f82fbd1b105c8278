from __future__ import annotations

import dataclasses

import pytest

from memorised import data, probability, quiet
from palimpsest.data.records import Roles
from palimpsest.erase.retrain import Retrain
from palimpsest.errors import PalimpsestError
from palimpsest.models.loading import load
from palimpsest.system import create
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune
from pictured import accuracy, pictures

LEARNING = Training(learning_rate=1e-2, epochs=10)


@pytest.fixture
def learned(saved):
    return Finetune(training=LEARNING).apply(load(saved), Roles(train=data().train), quiet())


def test_retraining_repeats_the_ledger_without_the_forget_set(saved, learned):
    after = create("retrain").apply(learned, data(), quiet())
    expected = Finetune(training=LEARNING).apply(load(saved), Roles(train=data().retain), quiet())
    assert after.digest() == expected.digest()
    assert probability(after, data().forget) < probability(learned, data().forget)
    assert [entry.method for entry in after.ledger.entries] == ["finetune", "retrain"]


def test_retraining_takes_a_named_start_and_recipe(saved, llama):
    after = Retrain(base=str(saved), training=LEARNING).apply(llama, data(), quiet())
    expected = Finetune(training=LEARNING).apply(llama, Roles(train=data().retain), quiet())
    assert after.digest() == expected.digest()


def test_the_given_model_is_left_as_it_was(learned):
    before = learned.digest()
    Retrain().apply(learned, data(), quiet())
    assert learned.digest() == before


def test_a_model_without_a_history_is_refused(llama):
    with pytest.raises(PalimpsestError, match=r"the ledger does not say how this model learned\. Name the start"):
        Retrain().apply(llama, data(), quiet())


def test_a_longer_history_needs_a_named_base(learned):
    later = create("gradient-ascent", **{"training.epochs": 1}).apply(learned, data(), quiet())
    with pytest.raises(PalimpsestError, match=r"more than one thing was done to this model \(finetune, gradient-asc"):
        Retrain().apply(later, data(), quiet())


def test_a_classifier_is_retrained_without_the_forgotten_label(convnet, tmp_path):
    base = load(convnet.save_pretrained(tmp_path / "base"))
    base.ledger = dataclasses.replace(base.ledger, source=str(tmp_path / "base"))
    recipe = Training(learning_rate=3e-3, epochs=5, batch_size=16, warmup_epochs=0.0)
    learned = Finetune(training=recipe).apply(base, Roles(train=pictures().train), quiet())
    after = Retrain().apply(learned, pictures(), quiet())
    expected = Finetune(training=recipe).apply(load(tmp_path / "base"), Roles(train=pictures().retain), quiet())
    assert after.digest() == expected.digest()
    assert accuracy(after, pictures().forget) < accuracy(learned, pictures().forget)
