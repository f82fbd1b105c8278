"""The training loop on classifiers: everything that holds for language models, and what batch normalisation adds."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from conftest import CLASSIFIERS, build_model, build_text_classifier
from memorised import quiet
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.loading import load
from palimpsest.statistics.predictions import classify
from palimpsest.train import Training, schedule, train
from pictured import accuracy, pictures

SHORT = Training(learning_rate=3e-3, epochs=3, batch_size=8, weight_decay=0.0, warmup_epochs=0.0)
AVERAGES = "running_mean"


def cross_entropy(batch):
    return batch.records.cross_entropy


def learn(model, training=SHORT, run=None, objective=cross_entropy, records=None, **keywords):
    run = run or quiet()
    plan = schedule(model, training, run, records=records or pictures().train)
    return train(model, plan, objective, training, run, **keywords)


def state(model) -> torch.Tensor:
    """Weights and running averages."""
    return torch.cat([value.detach().float().flatten() for value in model.network.state_dict().values()])


def averages(model) -> torch.Tensor:
    return torch.cat([b.flatten() for n, b in model.network.named_buffers() if n.endswith(AVERAGES)])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_it_learns_and_leaves_the_given_model(name):
    model = build_model(name)
    before = model.digest()
    result = learn(model, dataclasses.replace(SHORT, epochs=10))
    assert accuracy(model, pictures().train) < 0.6
    assert accuracy(result, pictures().train) > 0.95
    assert model.digest() == before
    assert not result.network.training


def test_texts_are_learned_too():
    model = build_text_classifier()
    records = [Record(text=text, label=i) for i, text in enumerate(("Where was Ada", "It is known", "I do not know"))]
    result = learn(model, Training(learning_rate=1e-2, epochs=20, batch_size=3), records=records)
    assert accuracy(result, records) == 1


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_same_seed_same_weights(name):
    model = build_model(name)
    first = learn(model, run=quiet(seed=1)).digest()
    torch.manual_seed(7)
    assert learn(model, run=quiet(seed=1)).digest() == first
    assert learn(model, run=quiet(seed=2)).digest() != first


@pytest.mark.parametrize(("name", "mode"), [("vit", "train"), ("convnet", "eval")])
def test_a_step_is_the_same_however_it_is_cut(name, mode):
    model = build_model(name)
    whole = learn(model, dataclasses.replace(SHORT, batch_size=16), mode=mode)
    cut = learn(model, dataclasses.replace(SHORT, batch_size=16, micro_tokens=3), mode=mode)
    torch.testing.assert_close(state(cut), state(whole), rtol=0, atol=1e-5)


def test_batch_normalisation_in_training_uses_and_moves_its_averages(tmp_path):
    model = build_model("convnet")
    result = learn(model)
    assert not torch.equal(averages(result), averages(model))
    loaded = load(result.save_pretrained(tmp_path / "model"))
    assert torch.equal(averages(loaded), averages(result))
    assert torch.equal(
        classify(loaded, pictures().test, quiet()).logits, classify(result, pictures().test, quiet()).logits
    )


def test_in_the_mode_eval_neither_averages_move_nor_anything_drops_out():
    model = build_model("convnet")
    result = learn(model, mode="eval")
    assert torch.equal(averages(result), averages(model))
    assert not torch.equal(state(result), state(model))
    dropping = build_model("vit")
    for module in dropping.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert learn(dropping, mode="eval").digest() == learn(build_model("vit"), mode="eval").digest()
    assert learn(dropping).digest() != learn(build_model("vit")).digest()


def test_looking_at_the_model_between_steps_does_not_end_the_training_mode():
    def look(step, student):
        classify(student, pictures().test, quiet())
        student.network.eval()
        return False

    model = build_model("convnet")
    assert torch.equal(state(learn(model, stop=look)), state(learn(model)))


class KilledError(Exception):
    """Stands for an end from outside."""


def test_interrupted_training_goes_on_with_its_averages(tmp_path):
    def stop(step, student):
        if step == 7:
            raise KilledError
        return False

    model, run = build_model("convnet"), quiet(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KilledError):
        learn(model, run=run, stop=stop)
    steps = []
    resumed = learn(model, run=run, stop=lambda step, _: bool(steps.append(step)))
    assert steps == [7, 8, 9, 10, 11, 12]
    torch.testing.assert_close(state(resumed), state(learn(model)), rtol=0, atol=1e-6)


def test_a_loss_without_a_value_stops_and_names_the_step(convnet):
    calls = []

    def spoilt(batch):
        calls.append(1)
        return batch.records.cross_entropy * (float("nan") if len(calls) == 3 else 1)

    with pytest.raises(PalimpsestError, match="the loss is nan at step 3; no checkpoint was due yet"):
        learn(convnet, objective=spoilt)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_low_rank_training_reaches_convolutions_and_gives_a_plain_network(name):
    model = build_model(name)
    result = learn(model, dataclasses.replace(SHORT, lora_rank=2, learning_rate=1e-2))
    assert type(result.network) is type(model.network)
    before = dict(model.network.named_parameters())
    changed = {n for n, weight in result.network.named_parameters() if not torch.equal(weight, before[n])}
    matrices = {n for n, weight in before.items() if weight.ndim in (2, 4) and "token" not in n}
    assert changed == {n for n in matrices if "position_embeddings" not in n}
    gc.collect()


def test_only_chosen_weights_train(convnet):
    result = learn(convnet, trainable=lambda name: name.startswith("classifier"))
    before = dict(convnet.network.named_parameters())
    changed = {n for n, weight in result.network.named_parameters() if not torch.equal(weight, before[n])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}


def test_mixed_precision_learns_as_well(convnet):
    result = learn(convnet, dataclasses.replace(SHORT, epochs=10), run=quiet(precision="bfloat16"))
    assert accuracy(result, pictures().train) > 0.95
    assert result.network.dtype == torch.float32
