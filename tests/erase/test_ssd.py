from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memorised import people, quiet
from one_by_one import roughened, some_records
from palimpsest.data.digits import digits
from palimpsest.data.records import Record, Roles
from palimpsest.erase.ssd import SSD, dampen, factors
from palimpsest.errors import PalimpsestError
from palimpsest.ledger import Entry
from palimpsest.models.hooks import no_hooks_left
from palimpsest.statistics import fisher as module
from palimpsest.statistics.examples import cross_entropy
from palimpsest.statistics.fisher import diagonal_fisher
from palimpsest.system import create, to_dict


class _Weights(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


IMAGES = Roles(train=some_records("vit"), forget=some_records("vit")[:2], retain=some_records("vit")[2:])


def notes(model):
    return model.ledger.entries[-1].notes


def same(first, second):
    other = second.network.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.network.state_dict().items())


# --- the mathematics -------------------------------------------------------------------------------------------------


def test_ssd_matches_the_worked_example():
    network = _Weights([2.0, -3.0, -1.0])
    importance, forget = {"w": torch.tensor([1.0, 1.0, 4.0])}, {"w": torch.tensor([20.0, 5.0, 100.0])}
    report = dampen(network, importance, forget, alpha=10, dampening=1)
    torch.testing.assert_close(network.w.data, torch.tensor([0.1, -3.0, -0.04]))
    assert report["selected"] == pytest.approx(2 / 3)
    assert report["selected_by_layer"] == {"w": pytest.approx(2 / 3)}
    assert report["beta_histogram"] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_above_alpha_the_dampening_sets_the_threshold():
    """For lambda > alpha beta is 1 up to lambda: the result is that of alpha = lambda."""
    importance, forget = torch.rand(200) + 0.1, 20 * torch.rand(200)
    _, beta = factors(importance, forget, alpha=3, dampening=8)
    _, other = factors(importance, forget, alpha=8, dampening=8)
    torch.testing.assert_close(beta, other)
    assert (factors(importance, forget, alpha=3, dampening=1)[1] != other).any()


POSITIVE = st.floats(0, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), POSITIVE, POSITIVE), min_size=1, max_size=20),
    st.floats(0.01, 1e3),
    st.floats(0.01, 1e3),
)
def test_weights_only_shrink_and_keep_their_sign(rows, alpha, dampening):
    before, importance, forget = (torch.tensor(column) for column in zip(*rows, strict=True))
    network = _Weights(before.tolist())
    dampen(network, {"w": importance}, {"w": forget}, alpha, dampening)
    after = network.w.data
    assert (after.abs() <= before.abs()).all()
    assert (after * before >= 0).all()
    untouched = forget <= alpha * importance
    assert torch.equal(after[untouched], before[untouched])


def test_no_importance_on_both_sides_is_no_number_nowhere():
    network = _Weights([1.0, 2.0])
    dampen(network, {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}, alpha=1)
    assert network.w.tolist() == [1, 0]


def test_half_precision_weights_are_edited_in_float32_and_the_others_kept():
    network = _Weights([1.0, 3.0, 5.0]).to(torch.bfloat16)
    dampen(network, {"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([3.0, 1.0, 7.0])}, alpha=2)
    expected = torch.tensor([1 / 3, 3, 5 / 7]).to(torch.bfloat16)
    assert network.w.dtype == torch.bfloat16
    assert torch.equal(network.w.data, expected)


# --- on networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "vit", "llama", "moe"])
def test_the_edit_is_what_the_importances_say(name):
    model = roughened(name)
    given = IMAGES if name in ("convnet", "vit") else Roles(train=people()[:8], forget=people()[:2])
    edited = SSD(alpha=2.0).apply(model, given, quiet())
    whole, forget = (diagonal_fisher(model, given[role], quiet()).values for role in ("train", "forget"))
    after = dict(edited.network.named_parameters())
    changed = 0
    for key, weight in model.network.named_parameters():
        selected = forget[key] > 2 * whole[key]
        expected = torch.where(selected, weight * whole[key] / forget[key], weight)
        torch.testing.assert_close(after[key], expected)
        assert torch.equal(after[key][~selected], weight[~selected])
        changed += int(selected.sum())
    assert notes(edited)["selected"] == pytest.approx(changed / model.parameters)
    assert changed > 0
    buffers = dict(edited.network.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in model.network.named_buffers())
    assert no_hooks_left(edited.network)


def test_forgetting_everything_selects_nothing(convnet):
    records = some_records("convnet")
    for alpha in (1.0, 3.0):
        edited = SSD(alpha=alpha).apply(convnet, Roles(train=records, forget=records), quiet())
        assert same(edited, convnet)


@pytest.mark.parametrize("name", ["convnet", "llama"])
def test_at_the_bound_nothing_is_selected_and_that_is_said(name):
    model = roughened(name)
    given = IMAGES if name == "convnet" else Roles(train=people()[:7], forget=people()[:2])
    for alpha in (3.5, 10.0):
        edited = SSD(alpha=alpha).apply(model, given, quiet())
        assert same(edited, model)
        assert notes(edited)["bound"] == pytest.approx(3.5)
        assert "nothing can be selected" in notes(edited)["warnings"][0]
    whole, forget = (diagonal_fisher(model, given[role], quiet()).values for role in ("train", "forget"))
    ratios = torch.cat([(forget[key] / whole[key])[whole[key] > 0] for key in whole])
    assert 3 < float(ratios.max()) <= 3.5 * (1 + 1e-5)
    assert all((forget[key][whole[key] == 0] == 0).all() for key in whole)


@pytest.mark.parametrize("mode", ["per_sample", "batch", "label_free"])
def test_the_scale_of_the_loss_does_not_matter(mode, monkeypatch):
    model = roughened("convnet")
    method = SSD(alpha=1.7, mode=mode, batch_size=2)
    plain = method.apply(model, IMAGES, quiet())
    name = "squared_logits" if mode == "label_free" else "cross_entropy"
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: 1000 * original(*given))
    if mode == "per_sample":
        stream = module.stream_gradients
        scaled = lambda z, y: 1000 * cross_entropy(z, y)  # noqa: E731
        monkeypatch.setattr(module, "stream_gradients", lambda *a, **k: stream(*a, loss=scaled, **k))
    again = method.apply(model, IMAGES, quiet())
    assert notes(again)["selected"] == pytest.approx(notes(plain)["selected"], rel=1e-3)
    assert notes(again)["importances"] != notes(plain)["importances"]
    for (_, first), (_, second) in zip(plain.network.named_parameters(), again.network.named_parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_batches_of_one_are_single_samples(vit):
    sample = SSD(alpha=2.0).apply(vit, IMAGES, quiet())
    batch = SSD(alpha=2.0, mode="batch", batch_size=1).apply(vit, IMAGES, quiet())
    for first, second in zip(sample.network.parameters(), batch.network.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_tied_embeddings_are_dampened_once():
    model = roughened("llama")
    edited = SSD(alpha=2.0).apply(model, Roles(train=people()[:8], forget=people()[:2]), quiet()).network
    assert edited.lm_head.weight is edited.model.embed_tokens.weight
    whole, forget = (diagonal_fisher(model, people()[:n], quiet()).values for n in (8, 2))
    key = "model.embed_tokens.weight"
    beta = factors(whole[key], forget[key], 2.0, 1.0)[1]
    torch.testing.assert_close(edited.lm_head.weight, model.network.lm_head.weight * beta)
    assert (beta < 1).any()


def test_a_class_is_forgotten_and_the_others_are_not():
    from palimpsest.reproduce.classifier import LEARNING, new_classifier
    from palimpsest.statistics.predictions import classify

    given = digits(0)
    training = dataclasses.replace(LEARNING["convnet"].training, epochs=4, batch_size=64)
    learn = dataclasses.replace(LEARNING["convnet"], training=training)
    model = learn.apply(new_classifier(1), Roles(train=given.train), quiet())
    edited = SSD().apply(model, given, quiet())

    def accuracy(model, role):
        return float(classify(model, given[role], quiet()).correct.float().mean())

    assert accuracy(model, "forget") > 0.95
    for role in ("forget", "holdout"):
        assert accuracy(edited, role) < 0.1
    for role in ("retain", "test"):
        assert accuracy(edited, role) > accuracy(model, role) - 0.03
    assert 0 < notes(edited)["selected"] < 0.1


# --- what is stored and said -----------------------------------------------------------------------------------------


def test_stored_importances_stand_in_for_the_training_data(vit, tmp_path):
    path = diagonal_fisher(vit, IMAGES.train, quiet(), batch_size=128).save(tmp_path / "importance.safetensors")
    direct = SSD().apply(vit, IMAGES, quiet())
    stored = SSD(importance=str(path)).apply(vit, Roles(forget=IMAGES.forget), quiet())
    assert same(direct, stored)
    assert notes(stored)["importances"] == notes(direct)["importances"]
    assert notes(stored)["alpha"] == notes(direct)["alpha"] == pytest.approx(0.5 * 7 / 2)


def test_retain_and_forget_together_are_the_training_data(vit):
    direct = SSD().apply(vit, IMAGES, quiet())
    joined = SSD().apply(vit, Roles(forget=IMAGES.forget, retain=IMAGES.retain), quiet())
    for first, second in zip(direct.network.parameters(), joined.network.parameters(), strict=True):
        torch.testing.assert_close(first, second)
    assert notes(joined)["bound"] == pytest.approx(3.5)


def test_a_dry_run_reports_and_changes_nothing(vit):
    dry = SSD(alpha=2.0, dry_run=True).apply(vit, IMAGES, quiet())
    wet = SSD(alpha=2.0).apply(vit, IMAGES, quiet())
    assert same(dry, vit)
    assert not same(wet, vit)
    assert notes(dry) == notes(wet)


def test_the_ledger_says_what_was_selected(vit):
    edited = SSD(alpha=2.0).apply(vit, IMAGES, quiet())
    found = notes(edited)
    assert set(found["selected_by_layer"]) >= {"vit.layers.0", "vit.layers.1", "classifier"}
    assert 0 < found["selected"] < 1
    assert sum(found["beta_histogram"]) == round(found["selected"] * vit.parameters)
    assert found["examples"] == {"train": 7, "forget": 2}
    zeros = diagonal_fisher(vit, IMAGES.forget, quiet(), batch_size=128).zeros
    assert found["zero_importances"]["forget"] == zeros
    assert len(found["importances"]["train"]) == 64
    entry = edited.ledger.entries[-1]
    assert Entry(**json.loads(json.dumps(dataclasses.asdict(entry)))) == entry
    assert create("ssd", **json.loads(json.dumps(to_dict(SSD(alpha=2.0))))) == SSD(alpha=2.0)


def test_a_large_selection_is_a_danger_and_none_is_said(vit):
    many = SSD(alpha=0.5).apply(vit, IMAGES, quiet())
    assert "above 10% models collapse. Raise alpha" in notes(many)["warnings"][0]
    first = IMAGES.train[0]  # three times among seven, so that no ratio is above 7 / 3
    none = SSD(alpha=2.5).apply(vit, Roles(forget=[first], train=[first, first, *IMAGES.train[:5]]), quiet())
    assert same(none, vit)
    assert notes(none)["bound"] == 7
    assert "nothing was changed" in notes(none)["warnings"][0]
    few = SSD(alpha=3.0).apply(vit, IMAGES, quiet())
    assert 0 < notes(few)["selected"] < 0.1
    assert "warnings" not in notes(few)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf, "all", True])
def test_alpha_must_be_a_number_above_0(alpha):
    with pytest.raises(PalimpsestError, match=r"ssd: alpha is .*, expected a number above 0, or auto"):
        SSD(alpha=alpha)


def test_dampening_must_be_above_0():
    with pytest.raises(PalimpsestError, match=r"ssd: dampening is 0\.0, expected above 0"):
        SSD(dampening=0.0)
    ones = {"w": torch.ones(1)}
    for name, fields in (("alpha", {"alpha": 0.0}), ("dampening", {"alpha": 1.0, "dampening": -1.0})):
        with pytest.raises(PalimpsestError, match=f"ssd: {name} is"):
            dampen(_Weights([1.0]), ones, ones, **fields)


def test_empty_and_foreign_forget_sets_are_named(vit):
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        SSD().apply(vit, Roles(forget=[], train=IMAGES.train), quiet())
    with pytest.raises(PalimpsestError, match='ssd needs the role "train" or "retain"'):
        SSD().apply(vit, Roles(forget=IMAGES.forget), quiet())
    foreign = [Record(image=torch.zeros(3, 16, 16), label=0)]
    with pytest.raises(PalimpsestError, match="some forget records are not in train"):
        SSD().apply(vit, Roles(forget=foreign, train=IMAGES.train), quiet())
    SSD(alpha=2.0).apply(vit, Roles(forget=foreign, train=IMAGES.train), quiet())


def test_labels_that_the_network_does_not_have_are_named(vit):
    wrong = [Record(image=torch.zeros(3, 16, 16), label=4)]
    with pytest.raises(PalimpsestError, match=r"has the label 4, but the network has labels 0 to 3"):
        SSD().apply(vit, Roles(forget=wrong, retain=IMAGES.retain), quiet())


def test_importances_of_another_model_or_kind_are_refused(vit, tmp_path):
    path = diagonal_fisher(vit, IMAGES.train, quiet()).save(tmp_path / "importance.safetensors")
    given = Roles(forget=IMAGES.forget)
    with pytest.raises(PalimpsestError, match="stored importances have mode per_sample, expected batch"):
        SSD(importance=str(path), mode="batch").apply(vit, given, quiet())
    with pytest.raises(PalimpsestError, match="the importances belong to a model with weights"):
        SSD(importance=str(path)).apply(roughened("vit"), given, quiet())
    with pytest.raises(PalimpsestError, match="does not exist"):
        SSD(importance=str(tmp_path / "none")).apply(vit, given, quiet())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w": torch.ones(2)}, r"w has shape \[2\], expected \[1\]"),
        ({"v": torch.ones(1)}, "importances: w is missing"),
        ({"w": torch.tensor([math.inf])}, "w has values that are not finite"),
        ({"w": torch.tensor([math.nan])}, "w has values that are not finite"),
        ({"w": torch.ones(1, dtype=torch.float16)}, "w is float16"),
        ({"w": torch.ones(1, dtype=torch.int64)}, "w is int64"),
    ],
)
def test_what_is_no_importance_is_refused_on_either_side(values, message):
    right = {"w": torch.ones(1)}
    for pair in ((values, right), (right, values)):
        with pytest.raises(PalimpsestError, match=message):
            dampen(_Weights([1.0]), *pair, alpha=1)
