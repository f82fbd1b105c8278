from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from palimpsest.data.digits import digits
from palimpsest.data.records import by_subject, check_disjoint
from palimpsest.errors import PalimpsestError


def keys(records) -> set[str]:
    return {record.key for record in records}


def test_a_class_is_forgotten_and_the_rest_retained():
    data = digits(classes=(3,))
    assert {record.label for record in (*data.forget, *data.holdout)} == {3}
    assert {record.label for record in (*data.retain, *data.test)} == set(range(10)) - {3}
    assert by_subject(data.train, "digit 3")[0] == [r for r in data.train if r.label == 3]
    assert sum(len(data[role]) for role in ("train", "holdout", "test")) == 1797


@pytest.mark.parametrize(
    "choice",
    [
        {"classes": (1, 4, 7, 8)},
        {"classes": (2,), "share": 0.5, "pick": "neighbours"},
        {"classes": (), "share": 0.05, "labels": "wrong"},
    ],
)
def test_train_is_forget_and_retain_and_nothing_of_it_is_tested(choice):
    data = digits(1, **choice)
    check_disjoint(data.forget, data.retain, ("forget", "retain"))
    assert keys(data.train) == keys(data.forget) | keys(data.retain)
    assert len(data.train) == len(data.forget) + len(data.retain)
    assert not keys(data.train) & keys([*data.holdout, *data.test])


def test_pixels_are_ready_for_a_network():
    image = digits().train[0].image
    assert (image.shape, image.dtype) == ((1, 8, 8), np.float32)
    pixels = np.stack([record.image for record in digits().train])
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_the_split_is_the_same_for_every_class_and_drawn_from_the_seed():
    counts = Counter(record.label for record in digits(classes=(0,), train_share=0.5).train)
    assert set(counts.values()) <= {87, 88, 89, 90, 91, 92}  # 174 to 183 images a class
    assert digits(1).digest() == digits(1).digest() != digits(2).digest()
    assert [r.label for r in digits(1).train] != sorted(r.label for r in digits(1).train)


def test_a_share_of_a_class_leaves_the_rest_of_it_in_place():
    whole, part = digits(classes=(5,)), digits(classes=(5,), share=0.25)
    assert len(part.forget) == round(0.25 * len(whole.forget))
    assert 5 in {record.label for record in part.retain}
    assert keys(part.holdout) == keys(whole.holdout)
    assert keys(part.holdout) < keys(part.test)  # the class is still there to be scored


def test_neighbours_lie_closer_together_than_random_images():
    def spread(pick: str) -> float:
        images = np.stack([r.image.ravel() for r in digits(classes=(9,), share=0.2, pick=pick).forget])
        return float(images.var(0).sum())

    assert spread("neighbours") < 0.8 * spread("random")


def test_wrong_labels_are_other_ones_and_only_of_the_forget_set():
    data = digits(classes=(), share=0.05, labels="wrong")
    assert all(record.subject != f"digit {record.label}" for record in data.forget)
    assert {record.label for record in data.forget} == set(range(10))
    rest = (*data.retain, *data.test, *data.holdout)
    assert all(record.subject == f"digit {record.label}" for record in rest)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"classes": (10,)}, "there is no digit 10"),
        ({"share": 0.0}, "share is 0, expected above 0 and at most 1"),
        ({"train_share": 1.0}, "train_share is 1, expected above 0 and below 1"),
        ({"classes": (), "share": 1.0}, "nothing is left to retain"),
    ],
)
def test_what_cannot_be_chosen_is_named(choice, told):
    with pytest.raises(PalimpsestError, match=told):
        digits(**choice)
