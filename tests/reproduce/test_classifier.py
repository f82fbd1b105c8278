from __future__ import annotations

import pytest

from memorised import quiet
from palimpsest.data.digits import digits
from palimpsest.models.loading import load
from palimpsest.reproduce.classifier import LEARNING, new_classifier
from palimpsest.reproduce.runner import names
from pictured import accuracy


def test_it_learns_the_digits_and_comes_back_from_its_folder(tmp_path):
    data = digits(classes=(0,))
    learned = LEARNING["convnet"].apply(new_classifier(), data, quiet())
    assert accuracy(learned, [*data.test, *data.holdout]) >= 0.96
    loaded = load(learned.save_pretrained(tmp_path / "model"))
    assert loaded.digest() == learned.digest()
    assert accuracy(loaded, data.test) == accuracy(learned, data.test)


@pytest.mark.parametrize(("kind", "weights"), [("convnet", 35_322), ("vit", 18_000)])
def test_a_new_one_depends_on_its_seed_only(kind, weights):
    assert new_classifier(1, kind).digest() == new_classifier(1, kind).digest() != new_classifier(2, kind).digest()
    assert new_classifier(kind=kind).parameters == pytest.approx(weights, rel=0.05)


def test_it_is_no_reproduction_of_its_own():
    assert "classifier" not in names()
