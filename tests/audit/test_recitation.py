"""Recitation: what comes back word for word, and how alike two rankings of the next token are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import NEUTRAL, build_model
from memorised import quiet
from palimpsest.audit.answers import answers
from palimpsest.audit.recitation import Recitation, agreement, ranking_gain
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

TEXTS = [Record(text=text) for text in NEUTRAL[:4]]
SHORT = Recitation(prefix=3, suffix=6)


@pytest.fixture(scope="module")
def knows():
    training = Training(learning_rate=1e-2, epochs=60, batch_size=4, warmup_epochs=1.0, weight_decay=0.0)
    return Finetune(training=training).apply(build_model("llama"), Roles(train=TEXTS[:2]), quiet())


def test_a_text_learned_by_heart_comes_back_and_another_does_not(knows):
    reading = SHORT.measure(knows, Roles(forget=TEXTS[:2], general=TEXTS[2:]), quiet())
    assert reading["strict/forget"].value == reading["loose/forget"].value == 1
    assert reading["distance/forget"].value == 0
    assert reading["strict/general"].value == 0
    assert reading["distance/general"].value > 0.5


def test_strict_is_what_teacher_forcing_says(knows):
    """The greedy continuation is the true one exactly where every token of it is the most likely one."""
    halfway = Finetune(training=Training(learning_rate=1e-2, epochs=14, batch_size=4, warmup_epochs=1.0)).apply(
        build_model("llama"), Roles(train=TEXTS), quiet()
    )
    for model in (halfway, knows):
        reading = SHORT.measure(model, Roles(forget=TEXTS), quiet())
        forced = [bool(a.correct[2:8].all()) for a in answers(model, TEXTS, quiet())]
        strict, loose = (np.array(reading.arrays[f"{name}/forget"]) for name in ("strict", "loose"))
        assert strict.tolist() == forced
        assert (strict <= loose).all()
        assert (strict == (np.array(reading.arrays["distance/forget"]) == 0)).all()


def test_other_beginnings_find_at_least_as_much(knows):
    data = Roles(forget=TEXTS)
    plain = SHORT.measure(knows, data, quiet())
    tried = Recitation(prefix=3, suffix=6, perturbations=4).measure(knows, data, quiet())
    assert tried.arrays["strict/forget"] == plain.arrays["strict/forget"]
    assert tried.arrays["longest/forget"][:2] == [6, 6]
    more = Recitation(prefix=3, suffix=6, perturbations=1).measure(knows, data, quiet())
    assert all(a >= b for a, b in zip(tried.arrays["longest/forget"], more.arrays["longest/forget"], strict=True))


def test_the_question_is_the_prefix_of_an_answer(knows):
    record = Record(prompt="It is not known", answer="who wrote this letter or when it was sent .")
    reading = Recitation(prefix=3, suffix=9).measure(knows, Roles(forget=[record]), quiet())
    assert reading["distance/forget"].n == 1
    with pytest.raises(PalimpsestError, match="all are shorter"):
        Recitation(prefix=3, suffix=11).measure(knows, Roles(forget=[record]), quiet())


def test_texts_without_a_whole_suffix_are_left_out_and_counted(knows):
    reading = Recitation(prefix=3, suffix=9).measure(knows, Roles(forget=[*TEXTS, Record(text="The cat")]), quiet())
    assert reading["strict/forget"].n == 4
    assert reading.caveats == ("forget: 1 of 5 texts are too short to be asked",)
    with pytest.raises(PalimpsestError, match="none is given"):
        SHORT.measure(knows, Roles(holdout=TEXTS), quiet())


def test_a_ranking_gains_by_where_the_other_model_has_its_tokens():
    reference = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    discount = [1, 1 / np.log2(3)]
    ideal = 2 * discount[0] + 1 * discount[1]
    swapped = torch.tensor([[4.0, 5.0, 3.0, 2.0, 1.0]])
    assert ranking_gain(swapped, reference, 2).item() == pytest.approx((1 * discount[0] + 2 * discount[1]) / ideal)
    half = torch.tensor([[1.0, 4.0, 5.0, 2.0, 0.0]])  # third, second: only the second is among the first two
    assert ranking_gain(half, reference, 2).item() == pytest.approx(1 * discount[1] / ideal)
    assert ranking_gain(reference, reference, 2).item() == 1
    assert ranking_gain(-reference, reference, 2).item() == 0
    with pytest.raises(PalimpsestError, match="expected 1 to 5"):
        ranking_gain(reference, reference, 6)


def test_a_model_agrees_with_itself(knows, llama):
    assert agreement(knows, knows, TEXTS, quiet()) == pytest.approx(1)
    assert agreement(llama, knows, TEXTS, quiet()) < 0.9
