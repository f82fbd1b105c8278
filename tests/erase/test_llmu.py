from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.audit.answers import answers
from palimpsest.data.records import Record
from palimpsest.erase.llmu import LLMU
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training

SHORT = Training(learning_rate=1e-3, epochs=10, batch_size=4, warmup_epochs=0.0, decay="constant")


def test_llmu_lowers_the_forget_answers():
    before, roles = reciting(), data()
    after = LLMU(training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)
    assert probability(after, roles.retain) > probability(after, roles.forget)


def test_llmu_stops_when_the_forget_loss_is_large_enough():
    """With a limit that the first step passes, one step is all that is done."""
    model, roles = reciting(), data()
    stopped = LLMU(enough=1e-6, training=SHORT).apply(model, roles, quiet())
    one = Training(**{**vars(SHORT), "max_steps": 1})
    expected = LLMU(training=one).apply(model, roles, quiet())
    for weight, other in zip(stopped.network.parameters(), expected.network.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-5)


def test_only_the_steps_that_are_taken_are_drawn(llama):
    """A thousand epochs are the official default, a thousand steps its limit."""
    many = Training(**{**vars(SHORT), "epochs": 1000, "batch_size": 1, "max_steps": 2})
    start = time.perf_counter()
    LLMU(training=many).apply(llama, data(), quiet())
    assert time.perf_counter() - start < 2


def test_random_answers_need_questions_to_take_them_from(llama):
    with pytest.raises(PalimpsestError, match="the retain set has no prompt with an answer"):
        LLMU(training=SHORT).apply(llama, data().replace(retain=[Record(text="It is not known .")]), quiet())


@pytest.mark.parametrize("micro_tokens", [4096, 40])
def test_it_stops_at_the_same_step_however_steps_are_cut(micro_tokens):
    """The longest answers come last: by themselves they pass the limit that the step as a whole does not."""
    words = "Ada lives in the old town near the river and walks to the market every day"
    known = data()
    forget = [*known.forget, *(dataclasses.replace(r, answer=f"{r.answer} {words}") for r in known.forget)]
    training = dataclasses.replace(SHORT, learning_rate=1e-9, epochs=3, batch_size=8, micro_tokens=micro_tokens)
    mean = -float(np.mean([a.log_prob.sum() for a in answers(reciting(), forget, quiet())]))
    mean /= float(np.mean([len(a.log_prob) for a in answers(reciting(), forget, quiet())]))
    steps: list[int] = []
    run = quiet(stop=lambda step, _: bool(steps.append(step)))
    for enough, expected in ((1.05 * mean, 3), (0.95 * mean, 1)):
        steps.clear()
        LLMU(enough=enough, training=training).apply(reciting(), known.replace(forget=forget), run)
        assert len(steps) == expected
