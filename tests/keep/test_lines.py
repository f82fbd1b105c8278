"""LiNeS: the factors of the blocks, what becomes of the weights, and how alpha is chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import data, quiet
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.keep.lines import LiNeS, accuracy, coefficients, factors, task_vector
from palimpsest.models.loading import DEFAULT, EMBEDDED, load
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune
from pictured import pictures

LEARN = Finetune(training=Training(learning_rate=5e-3, epochs=20, batch_size=6, warmup_epochs=0.0, weight_decay=0.0))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A saved model that knows the forget set, and what fine-tuning on the retain set made of it."""
    folder = build_model("llama").save_pretrained(tmp_path_factory.mktemp("base") / "base")
    before = LEARN.apply(load(folder), Roles(train=data().forget), quiet())
    folder = before.save_pretrained(tmp_path_factory.mktemp("knows") / "before")
    before = load(folder)
    before.ledger = dataclasses.replace(before.ledger, source=str(folder))
    return before, LEARN.apply(before, Roles(train=data().retain), quiet())


def weights(model):
    return dict(model.network.named_parameters())


def test_the_schedule_is_the_one_of_the_paper():
    expected = [0.1, 0.181818, 0.263636, 0.345455, 0.427273, 0.509091, 0.590909, 0.672727, 0.754545, 0.836364]
    assert coefficients(12, 0.1, 0.9).tolist() == pytest.approx([*expected, 0.918182, 1.0], abs=1e-6)
    with pytest.raises(PalimpsestError, match="at least 2 blocks"):
        coefficients(1, 0.1, 0.9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "moe"])
def test_what_is_outside_the_blocks_gets_alpha(name):
    network = build_model(name).network
    by = factors(network, 0.25, 0.5)
    assert set(by) == {n for n, _ in network.named_parameters()}
    assert set(by.values()) == {0.25, 0.75}
    deep = [n for n, value in by.items() if value == 0.75]
    assert all(".1." in n for n in deep)
    assert len(deep) == sum(".1." in n for n in by)
    backwards = factors(network, 0.25, 0.5, reverse=True)
    assert {n for n, value in backwards.items() if value == 0.75} == {n for n in by if ".0." in n}


def test_every_block_moves_by_its_factor(pair):
    before, tuned = pair
    edited = LiNeS(alpha=0.2).apply(tuned, Roles(), quiet())
    for name, weight in weights(edited).items():
        start, end = weights(before)[name], weights(tuned)[name]
        factor = 1.0 if ".layers.1." in name else 0.2
        torch.testing.assert_close(weight, start + factor * (end - start), rtol=0, atol=1e-6)
    notes = edited.ledger.entries[-1].notes
    assert notes["block_factor"] == pytest.approx([0.2, 1.0])
    assert all(norm > 0 for norm in notes["block_change"])


def test_the_ends_are_the_two_models(pair):
    before, tuned = pair
    back = LiNeS(alpha=0.0, beta=0.0).apply(tuned, Roles(), quiet())
    assert all(torch.equal(weight, weights(before)[name]) for name, weight in weights(back).items())
    whole = LiNeS(alpha=1.0).apply(tuned, Roles(), quiet())
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, weights(tuned)[name], rtol=0, atol=1e-7)


def test_without_slope_it_is_weight_interpolation(pair):
    before, tuned = pair
    flat = LiNeS(alpha=0.3, beta=0.0).apply(tuned, Roles(), quiet())
    uniform = LiNeS(alpha=0.3, schedule="uniform").apply(tuned, Roles(), quiet())
    assert flat.digest() == uniform.digest()
    assert uniform.ledger.entries[-1].method == "wise-ft"
    vector = task_vector(before.network, tuned.network)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(weights(flat)[name], weights(before)[name] + 0.3 * vector[name], rtol=0, atol=1e-7)


def test_all_the_way_back_the_old_knowledge_is_there_and_the_new_is_gone(pair):
    before, tuned = pair
    back = LiNeS(alpha=0.0, beta=0.0).apply(tuned, Roles(), quiet())
    for role, better in (("forget", before), ("retain", tuned)):
        records = data()[role]
        assert accuracy(back, records, quiet()) == accuracy(before, records, quiet())
        other = tuned if better is before else before
        assert accuracy(better, records, quiet()) > accuracy(other, records, quiet())


def test_alpha_is_chosen_on_validation_data(pair):
    before, tuned = pair
    roles = Roles(validation=data().retain, general=data().forget)
    edited = LiNeS(alpha="auto").apply(tuned, roles, quiet())
    notes = edited.ledger.entries[-1].notes
    scores = notes["alpha_score"]
    assert len(scores) == 11
    assert notes["alpha"] == pytest.approx(scores.index(max(scores)) / 10)
    whole = accuracy(tuned, roles.general, quiet()) / accuracy(before, roles.general, quiet())
    assert scores[10] == pytest.approx(2 + whole)  # at alpha 1 the task is kept whole
    by_hand = LiNeS(alpha=notes["alpha"]).apply(tuned, Roles(), quiet())
    assert edited.digest() == by_hand.digest()
    with pytest.raises(PalimpsestError, match='lines with alpha auto needs the role "general"'):
        LiNeS(alpha="auto").apply(tuned, Roles(validation=data().retain), quiet())
    with pytest.raises(PalimpsestError, match="the base tells nothing of general right"):
        LiNeS(alpha="auto").apply(tuned, Roles(validation=data().retain, general=data().general[:1]), quiet())


def test_classifiers_are_scaled_too():
    vit = build_model("vit")
    tuned = Finetune(training=dataclasses.replace(LEARN.training, epochs=2)).apply(vit, pictures(), quiet())
    vector = task_vector(vit.network, tuned.network)
    assert set(vector) == {name for name, _ in vit.network.named_parameters()}
    assert 0 <= accuracy(tuned, pictures().retain, quiet()) <= 1


def test_bad_input(pair, tmp_path):
    _, tuned = pair
    for alpha in (-0.1, float("nan"), "some"):
        with pytest.raises(PalimpsestError, match="alpha is"):
            LiNeS(alpha=alpha)
    other = build_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PalimpsestError, match="different architectures"):
        LiNeS(base=str(other)).apply(tuned, Roles(), quiet())
    broken = tuned.copy()
    with torch.no_grad():
        broken.network.model.norm.weight[0] = torch.nan
    with pytest.raises(PalimpsestError, match="not finite"):
        LiNeS().apply(broken, Roles(), quiet())
    lost = build_model("llama")
    lost.ledger = dataclasses.replace(lost.ledger, source="")
    with pytest.raises(PalimpsestError, match="Name the model before as base"):
        LiNeS().apply(lost, Roles(), quiet())


def test_a_start_with_other_changes_since_is_not_taken_for_the_model_before(saved, tmp_path):
    first = LEARN.apply(load(saved), Roles(train=data().forget), quiet())
    second = LEARN.apply(first, Roles(train=data().retain), quiet())
    assert LiNeS().apply(first, Roles(), quiet()).ledger.source == str(saved)
    with pytest.raises(PalimpsestError, match=r"not the model before the last change \(finetune\). Name that as base"):
        LiNeS().apply(second, Roles(), quiet())
    before = first.save_pretrained(tmp_path / "first")
    undone = LiNeS(base=str(before), alpha=0.0, beta=0.0).apply(second, Roles(), quiet())
    assert undone.digest() == first.digest()


def test_the_embedded_model_is_found_by_the_name_that_its_ledger_has(saved, monkeypatch):
    start = load(saved)
    start.ledger = dataclasses.replace(start.ledger, source=f"{EMBEDDED[1]} (SHA-256 0123)")
    tuned = LEARN.apply(start, Roles(train=data().retain), quiet())
    asked = []
    monkeypatch.setattr("palimpsest.models.loading.load", lambda name, run: asked.append(name) or load(saved))
    LiNeS().apply(tuned, Roles(), quiet())
    assert asked == [DEFAULT]


def test_a_base_that_is_far_away_is_said(pair, tmp_path):
    before, tuned = pair
    far = before.copy()
    with torch.no_grad():
        for weight in far.network.parameters():
            weight.mul_(4)
    folder = far.save_pretrained(tmp_path / "far")
    warnings = LiNeS(base=str(folder)).apply(tuned, Roles(), quiet()).ledger.entries[-1].notes["warnings"]
    assert "is that where it started?" in warnings[0]
