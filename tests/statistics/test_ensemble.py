from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from conftest import build_model, build_text_classifier
from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.statistics.ensemble import Ensemble, groups_like, places, subsets, train_together
from palimpsest.statistics.predictions import classify
from palimpsest.training.settings import Training
from palimpsest.write.finetune import Finetune
from pictured import pictures

KNOWN = pictures().train
SEEDS = (5, 6, 7)
WHOLE = Training(learning_rate=3e-3, epochs=3, batch_size=64, warmup_epochs=0.0, weight_decay=0.1, max_grad_norm=1e9)
PARTS = Training(
    learning_rate=3e-3, epochs=3, batch_size=7, max_steps=8, weight_decay=0.1, decay="cosine", max_grad_norm=0.5
)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def several(kind, many=3):
    """Models of one architecture with weights of their own."""
    models = [build_model(kind) for _ in range(many)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for weight in model.network.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=draw(number)))
    return models


@pytest.mark.parametrize("kind", ["vit", "convnet"])
@pytest.mark.parametrize("training", [WHOLE, PARTS], ids=["one batch", "mini-batches"])
def test_many_at_once_are_as_many_trainings_of_the_one_loop(kind, training):
    models, masks = several(kind), subsets(3, len(KNOWN), 16, draw())
    for model in models:
        model.network.double()  # Adam magnifies the rounding of gradients that are nearly zero
    together = train_together(Ensemble.of(models), KNOWN, places(masks), training, quiet(), seeds=SEEDS)
    for number, (model, mask) in enumerate(zip(models, masks, strict=True)):
        own = Roles(train=[record for record, inside in zip(KNOWN, mask, strict=True) if inside])
        alone = Finetune(training=training).apply(model, own, quiet(seed=SEEDS[number]))
        expected = classify(alone, KNOWN, quiet()).logits
        assert float((expected - classify(model, KNOWN, quiet()).logits).abs().max()) > 0.1  # it did learn
        torch.testing.assert_close(together.logits(KNOWN)[number].float(), expected, rtol=0, atol=1e-5)
        one = together.model(number)
        torch.testing.assert_close(classify(one, KNOWN, quiet()).logits, expected, rtol=0, atol=1e-5)
        for name, buffer in alone.network.named_buffers():  # running averages of the own subset alone
            torch.testing.assert_close(one.network.get_buffer(name), buffer, rtol=0, atol=1e-5)


def test_the_given_networks_stay_as_they_are():
    start = Ensemble.of(several("convnet"))
    before = start.logits(KNOWN)
    train_together(start, KNOWN, places(subsets(3, len(KNOWN), 8, draw())), WHOLE, quiet())
    assert torch.equal(start.logits(KNOWN), before)


def test_in_evaluation_mode_running_averages_stay():
    start = Ensemble.of(several("convnet"))
    rows = torch.arange(8).expand(3, -1)
    after = train_together(start, KNOWN, rows, WHOLE, quiet(), mode="eval")
    assert all(torch.equal(after.buffers[name], x) for name, x in start.buffers.items())
    assert not torch.equal(after.logits(KNOWN), start.logits(KNOWN))


def test_targets_and_weights_belong_to_their_rows():
    start = Ensemble.of(several("vit"))
    targets = torch.zeros(3, len(KNOWN), 4)
    targets[:, 8:16] = 7.0
    rows, weights = torch.arange(4, 12).expand(3, -1), torch.tensor([1.0] * 4 + [0.0] * 4)

    def squared(logits, target):
        return (logits - target).square().mean(-1)

    training = Training(**{**vars(WHOLE), "epochs": 40, "weight_decay": 0.0})
    after = train_together(start, KNOWN, rows, training, quiet(), targets=targets, loss=squared, weights=weights)
    logits = after.logits(KNOWN)
    assert float(logits[:, 4:8].abs().mean()) < 0.3 * float(start.logits(KNOWN)[:, 4:8].abs().mean())
    assert float((logits[:, 8:12] - 7).abs().mean()) > 4  # their weight was 0
    ascent = train_together(start, KNOWN, rows, WHOLE, quiet(), weights=-torch.ones(8))
    right = torch.tensor([record.label for record in KNOWN[4:12]])
    chances = [e.logits(KNOWN)[:, 4:12].softmax(-1)[:, range(8), right].mean() for e in (start, ascent)]
    assert chances[1] < chances[0]


def test_weights_of_each_step_let_records_take_turns():
    """Four records count in the first half of the steps: it is the training on these four alone; the others, then."""
    start, rows = Ensemble.of(several("vit")), torch.arange(8).expand(3, -1)
    first = torch.tensor([2.0] * 4 + [0.0] * 4)
    training = dataclasses.replace(WHOLE, epochs=6, decay="constant", warmup_epochs=0.0)
    turns = torch.stack([first] * 3 + [2 - first] * 3)
    after = train_together(start, KNOWN, rows, training, quiet(), weights=turns)
    half = dataclasses.replace(training, epochs=3)
    before = train_together(start, KNOWN, rows[:, :4], half, quiet())
    same = train_together(start, KNOWN, rows, half, quiet(), weights=turns[:3])
    for name, weight in before.parameters.items():
        assert_close(same.parameters[name], weight, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after.logits(KNOWN), same.logits(KNOWN), atol=1e-2)
    with pytest.raises(PalimpsestError, match=r"weights have shape \[3, 8\], expected \[8\] or \[6, 8\]"):
        train_together(start, KNOWN, rows, training, quiet(), weights=turns[:3])


def test_subsets_have_exactly_their_size_and_every_record_the_same_chance():
    masks = subsets(2000, 10, 3, draw())
    assert set(masks.sum(1).tolist()) == {3}
    assert masks.float().mean(0).sub(0.3).abs().max() < 0.04
    assert places(masks)[:5].tolist() == [mask.nonzero()[:, 0].tolist() for mask in masks[:5]]


def test_groups_are_like_the_forget_set_and_never_of_it():
    labels, forget = torch.arange(40) % 4, torch.tensor([0, 4, 8, 1, 12, 5])  # four of label 0, two of label 1
    masks = groups_like(forget, labels, 200, draw())
    found = {tuple(torch.bincount(labels[~mask], minlength=4).tolist()) for mask in masks}
    assert found == {(0, 4, 2, 0), (0, 0, 4, 2), (2, 0, 0, 4)}
    assert masks[:, forget].all()


def test_groups_are_filled_up_where_a_label_has_too_few():
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 8)
    masks = groups_like(torch.arange(4), labels, 50, draw())
    assert set((~masks).sum(1).tolist()) == {4}
    of_one = {int((~mask)[labels == 1].sum()) for mask in masks}
    assert 2 in of_one  # all that there are


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(2, 4, dtype=torch.long)}, r"rows have shape \[2, 4\], expected \[3, batch\]"),
        ({"rows": torch.full((3, 4), 99)}, "rows name a record outside 0 to 31"),
        ({"seeds": (1, 2)}, "there are 2 seeds for 3 networks"),
        ({"training": Training(lora_rank=2)}, "lora_rank is set"),
        ({"weights": torch.full((8,), torch.nan)}, "the loss of network 0 is nan"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"rows": torch.arange(8).expand(3, -1), "training": WHOLE, "run": quiet(), **change}
    with pytest.raises(PalimpsestError, match=message):
        train_together(Ensemble.of(several("convnet")), KNOWN, **given)


def test_what_does_not_stack_is_refused():
    for models, message in (
        ([], "needs at least one model"),
        ([build_model("vit"), build_model("convnet")], "expected one architecture"),
        ([build_text_classifier()], "takes input_ids; only image classifiers stack"),
        ([build_model("llama")], "LlamaForCausalLM is no classifier"),
    ):
        with pytest.raises(PalimpsestError, match=message):
            Ensemble.of(models)
    with pytest.raises(PalimpsestError, match="a subset has 10 of 10 points, expected 1 to 9"):
        subsets(2, 10, 10, draw())
    with pytest.raises(PalimpsestError, match="the masks include 1 to 2 points, expected equally many"):
        places(torch.tensor([[True, True], [True, False]]))
    with pytest.raises(PalimpsestError, match="no group of 3 records is left beside the forget set"):
        groups_like(torch.arange(3), torch.zeros(5, dtype=torch.long), 2, draw())
