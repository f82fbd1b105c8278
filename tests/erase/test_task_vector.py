from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.erase.task_vector import TaskVector, negate
from palimpsest.errors import PalimpsestError
from palimpsest.train import Training
from pictured import accuracy, pictures, recognising

FURTHER = Training(learning_rate=1e-3, epochs=10, warmup_epochs=0.0, weight_decay=0.0)


def test_the_step_goes_the_other_way_and_tied_weights_once(make_model):
    model, further = make_model("llama").network, make_model("llama").network
    with torch.no_grad():
        for weight in further.parameters():
            weight.add_(0.5)
    expected = {name: weight - 2 * 0.5 for name, weight in make_model("llama").network.named_parameters()}
    negate(model, further, alpha=2.0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_step_is_computed_in_float32(make_model):
    model, further = make_model("llama").network.bfloat16(), make_model("llama").network.bfloat16()
    negate(model, further, alpha=5.0)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


def test_the_forget_answers_go_down():
    before, roles = reciting(), data()
    after = TaskVector(alpha=5.0, training=FURTHER).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.7 * probability(before, roles.forget)


def test_a_small_step_is_proportional_to_alpha():
    model, roles = reciting(), data()
    far, near = (TaskVector(alpha=a, training=FURTHER).apply(model, roles, quiet()) for a in (2.0, 1.0))
    for start, one, two in zip(*(m.network.parameters() for m in (model, near, far)), strict=True):
        torch.testing.assert_close(two - start, 2 * (one - start), rtol=1e-4, atol=1e-6)


def test_alpha_is_above_zero():
    with pytest.raises(PalimpsestError, match="alpha is 0, expected above 0"):
        TaskVector(alpha=0)


def test_a_classifier_forgets_labels_and_keeps_its_running_averages():
    before, roles = recognising(), pictures()
    further = Training(learning_rate=3e-3, epochs=10, warmup_epochs=0.0, weight_decay=0.0)
    after = TaskVector(alpha=3.0, training=further).apply(before, roles, quiet())
    assert accuracy(after, roles.forget) <= 0.5
    for (name, one), (_, two) in zip(before.network.named_buffers(), after.network.named_buffers(), strict=True):
        assert torch.equal(one, two), name
    assert all((value > 0).all() for name, value in after.network.named_buffers() if name.endswith("running_var"))
