from __future__ import annotations

import pytest

from memorised import data, probability, quiet, reciting
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.write.finetune import Finetune
from pictured import accuracy, pictures, recognising


def test_the_model_recites_what_it_learned():
    model, learned = reciting(), data().train
    assert probability(model, learned) > 0.8
    assert model.answer([record.prompt for record in learned], max_new_tokens=12) == [r.answer for r in learned]


def test_what_was_not_learned_is_not_recited():
    assert probability(reciting(), data().holdout) < 0.1


def test_nothing_to_learn_is_refused(llama):
    with pytest.raises(PalimpsestError, match="the train set is empty"):
        Finetune().apply(llama, Roles(train=[]), quiet())
    with pytest.raises(PalimpsestError, match=r'finetune needs the role "train" \(given: forget\)'):
        Finetune().apply(llama, Roles(forget=data().forget), quiet())


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_a_classifier_learns_its_labels(kind):
    assert accuracy(recognising(kind), pictures().train) == 1
    assert accuracy(recognising(kind), [*pictures().test, *pictures().holdout]) > 0.7


def test_a_label_that_the_network_has_not_is_refused(convnet):
    wrong = Record(image=pictures().train[0].image, label=4)
    with pytest.raises(PalimpsestError, match=r"record 2 .* has the label 4, but the network has labels 0 to 3"):
        Finetune().apply(convnet, Roles(train=[pictures().train[0], wrong]), quiet())
