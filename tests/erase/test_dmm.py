from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.erase import dmm as module
from palimpsest.erase.dmm import DMM, dm_direct, lessons, matching_loss, mean_oracle
from palimpsest.errors import PalimpsestError
from palimpsest.models.loading import load
from palimpsest.statistics.attribution import Datamodel, family, names_of
from palimpsest.statistics.predictions import classify
from palimpsest.system import create
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune
from pictured import LEARNING, accuracy, never_saw, pictures, recognising

ROLES = pictures()
LONG = Training(
    learning_rate=3e-3,
    epochs=80,
    batch_size=64,
    weight_decay=0.0,
    warmup_epochs=0.0,
    decay="linear",
    max_grad_norm=1e9,
)
ONE_STEP = dataclasses.replace(LONG, epochs=1)


def logits(model, records):
    return classify(model, records, quiet()).logits


def exact(model, kind, tmp_path, **fields):
    """A file whose removal of the forget set gives exactly the outputs of a model that never saw it."""
    change = logits(model, ROLES.train) - logits(never_saw(kind), ROLES.train)
    b = torch.zeros(32, 32, 4)
    b[-8:] = change / 8  # the forget records are the last ones
    made = Datamodel(
        **{
            "contributions": b,
            "train": names_of(ROLES.train),
            "points": names_of(ROLES.train),
            "family": family(model),
            **fields,
        }
    )
    return str(made.save(tmp_path / "datamodel.safetensors"))


@pytest.fixture
def learned(tmp_path):
    """Makes a model whose ledger says from where it learned all, and how."""

    def make(kind):
        base = load(build_model(kind).save_pretrained(tmp_path / kind))
        base.ledger = dataclasses.replace(base.ledger, source=str(tmp_path / kind))
        return Finetune(training=LEARNING).apply(base, Roles(train=ROLES.train), quiet())

    return make


# --- the parts --------------------------------------------------------------------------------------------------------


def test_nothing_taken_away_changes_nothing():
    z = torch.randn(3, 4)
    assert torch.equal(dm_direct(z, torch.zeros(3, 4)), z)
    assert not matching_loss(z, z).any()
    torch.testing.assert_close(dm_direct(z, torch.ones(3, 4)), z - 1)  # contributions of the forget set are subtracted


def test_the_losses_match_worked_examples():
    z, t = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert matching_loss(z, t).tolist() == [2.5, 0.0]
    p, q = t.softmax(-1), z.log_softmax(-1)
    torch.testing.assert_close(matching_loss(z, t, "cross-entropy"), -(p * q).sum(-1))


def test_the_mean_of_oracles_is_of_logits_or_of_probabilities():
    outputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_oracle(outputs, "squared"), outputs.mean(0))
    torch.testing.assert_close(mean_oracle(outputs, "cross-entropy").softmax(-1), outputs.softmax(-1).mean(0))


def test_the_points_are_the_forget_set_and_retained_records_drawn_once():
    forget, retain = ROLES.forget, ROLES.retain

    def ids(*how, **run):
        return [id(record) for record in lessons(forget, retain, *how, quiet(**run))]

    kept, wanted = [id(record) for record in retain], [id(record) for record in forget]
    points = ids(1.0, 2.0)
    assert points[:8] == wanted
    assert len(set(points[8:])) == 16
    assert set(points[8:]) <= set(kept)
    assert points == ids(1.0, 2.0)
    assert points != ids(1.0, 2.0, seed=1)
    assert ids(2.5, 0.0) == [*wanted, *wanted, *wanted[:4]]
    assert ids(0.5, 0.0) == wanted[:4]


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_with_an_exact_datamodel_the_model_becomes_the_retrained_one(kind, tmp_path):
    before = recognising(kind)
    method = DMM(datamodel=exact(before, kind, tmp_path), training=LONG)
    after = method.apply(before, ROLES, quiet())
    target, records = never_saw(kind), ROLES.train

    def distance(model, of):
        return float((logits(model, of) - logits(target, of)).square().mean())

    assert distance(after, records) < 0.02 * distance(before, records)
    assert distance(after, ROLES.holdout) < 0.3 * distance(before, ROLES.holdout)
    assert accuracy(after, ROLES.forget) == accuracy(target, ROLES.forget) < 0.3
    assert accuracy(after, ROLES.retain) == 1
    assert after.ledger.entries[-1].notes["multiplier"] == 1


def objective_at_the_start(method, model, monkeypatch, roles=ROLES):
    seen, real = [], module.train

    def recorded(student, plan, objective, training, run, **how):
        return real(student, plan, lambda batch: seen.append(objective(batch)) or seen[-1], training, run, **how)

    monkeypatch.setattr(module, "train", recorded)
    method.apply(model, roles, quiet())
    return float(seen[0].detach())


def test_the_loss_is_the_mean_square_over_points_and_classes(tmp_path, monkeypatch):
    before = recognising("vit")
    method = DMM(datamodel=exact(before, "vit", tmp_path), training=ONE_STEP)
    points = lessons(ROLES.forget, ROLES.retain, 1.0, 3.0, quiet())
    expected = (logits(before, points) - logits(never_saw("vit"), points)).square().mean()
    assert objective_at_the_start(method, before, monkeypatch) == pytest.approx(float(expected), rel=1e-2)
    double = dataclasses.replace(method, multiplier=2.0)
    assert objective_at_the_start(double, before, monkeypatch) == pytest.approx(4 * float(expected), rel=1e-2)


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_without_contributions_the_loss_is_zero_at_the_start(kind, tmp_path, monkeypatch):
    before = recognising(kind)
    method = DMM(datamodel=exact(before, kind, tmp_path, contributions=torch.zeros(32, 32, 4)), training=ONE_STEP)
    assert objective_at_the_start(method, before, monkeypatch) == pytest.approx(0, abs=1e-9)


def test_normalisation_stays_unless_it_is_asked_for(tmp_path):
    before = recognising("convnet")
    method = DMM(datamodel=exact(before, "convnet", tmp_path), training=ONE_STEP)
    for mode, stays in (("eval", True), ("train", False)):
        after = dataclasses.replace(method, mode=mode).apply(before, ROLES, quiet())
        pairs = zip(before.network.named_buffers(), after.network.buffers(), strict=True)
        assert all(torch.equal(x, y) for (name, x), y in pairs if "running" in name) == stays


def test_the_anchor_holds_the_weights(tmp_path):
    before = recognising("vit")
    method = DMM(datamodel=exact(before, "vit", tmp_path), training=dataclasses.replace(LONG, epochs=20))

    def moved(anchor):
        after = dataclasses.replace(method, anchor=anchor).apply(before, ROLES, quiet())
        pairs = zip(before.network.parameters(), after.network.parameters(), strict=True)
        return sum(float((x - y).detach().square().sum()) for x, y in pairs)

    assert moved(10.0) < 0.3 * moved(0.0)


def test_trak_on_the_spot_moves_the_model_towards_the_retrained_one(learned):
    before = learned("convnet")
    after = DMM(models=3, training=LONG).apply(before, ROLES, quiet())
    target = learned_without(before)
    first, last = (
        float((logits(m, ROLES.forget) - logits(target, ROLES.forget)).square().mean()) for m in (before, after)
    )
    assert last < 0.7 * first
    assert accuracy(after, ROLES.retain) > 0.9
    assert after.ledger.entries[-1].notes["multiplier"] > 0


def learned_without(before):
    base = load(before.ledger.source)
    return Finetune(training=LEARNING).apply(base, Roles(train=ROLES.retain), quiet(seed=3))


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_oracle_matching_gives_what_oracles_say(loss, learned):
    before = learned("convnet")
    method = create("oracle-matching", models=2, loss=loss)
    after = dataclasses.replace(method, training=LONG).apply(before, ROLES, quiet())
    oracle = logits(learned_without(before), ROLES.forget).softmax(-1)
    distances = [float((logits(m, ROLES.forget).softmax(-1) - oracle).abs().sum(-1).mean()) for m in (before, after)]
    assert distances[1] < 0.3 * distances[0]
    assert after.ledger.entries[-1].method == "oracle-matching"


# --- bad input --------------------------------------------------------------------------------------------------------


def other(**roles):
    return ROLES.replace(**roles)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (other(forget=[]), "the forget set is empty"),
        (other(forget=ROLES.holdout[:1]), r'forget record "an image" .* is not in the training data'),
        (
            other(forget=[ROLES.forget[0]] * 2, retain=ROLES.retain),
            "2 times in the forget set.* is 1 times in the train",
        ),
        (other(train=ROLES.retain), "other training data: 32 records with digest .*, given are 24"),
        (other(train=None, retain=ROLES.retain[:-1]), "other training data: 32 records with digest .*, given are 31"),
        (other(forget=[*ROLES.holdout, *ROLES.test, *ROLES.forget]), "forget set has 40 records, more than the 32"),
        (other(retain=ROLES.test), "is not among the 32 points that the datamodel knows"),
    ],
)
def test_data_that_the_file_is_not_about_is_refused(roles, message, tmp_path):
    before = recognising("vit")
    method = DMM(datamodel=exact(before, "vit", tmp_path), retain_multiplier=0.5, training=ONE_STEP)
    with pytest.raises(PalimpsestError, match=message):
        method.apply(before, roles, quiet())


def test_models_that_the_file_is_not_about_are_refused(tmp_path):
    path = exact(recognising("vit"), "vit", tmp_path)
    with pytest.raises(PalimpsestError, match=r"the datamodel is about ViT.*, but the model is ResNet"):
        DMM(datamodel=path).apply(recognising("convnet"), ROLES, quiet())
    wrong = exact(recognising("vit"), "vit", tmp_path, contributions=torch.zeros(32, 32, 3))
    with pytest.raises(PalimpsestError, match="the datamodel has 3 classes, the model 4"):
        DMM(datamodel=wrong).apply(recognising("vit"), ROLES, quiet())


def test_a_multiplier_that_is_not_above_0_is_told(tmp_path):
    before = recognising("vit")
    path = exact(before, "vit", tmp_path, multiplier=-0.5)
    after = DMM(datamodel=path, training=ONE_STEP).apply(before, ROLES, quiet())
    assert "true changes are -0.5 times the predicted" in after.ledger.entries[-1].notes["warnings"][0]


def test_other_bad_input_is_named(tmp_path):
    before = recognising("vit")
    path = exact(before, "vit", tmp_path)
    for fields, roles, message in (
        ({"datamodel": path, "teacher": "oracles"}, ROLES, "a datamodel file is named, but the teacher is oracles"),
        ({"datamodel": str(tmp_path / "none")}, ROLES, "the datamodel file .* does not exist"),
        (
            {"datamodel": path, "retain_multiplier": 4.0},
            ROLES,
            "32 retained records are to be drawn, but retain has 24",
        ),
        ({"datamodel": path, "forget_multiplier": 0.01}, ROLES, "forget_multiplier 0.01 leaves none of 8 forget"),
        ({}, ROLES, "retrain: the ledger does not say how this model learned|retrain: more than one thing"),
        ({"teacher": "oracles"}, other(forget=ROLES.holdout), "forget record .* is not in the training data"),
        ({}, other(forget=ROLES.holdout), "forget record .* is not in the training data"),
    ):
        with pytest.raises(PalimpsestError, match=message):
            DMM(**fields).apply(before, roles, quiet())
    for fields, message in (
        ({"multiplier": 0.0}, "dmm: multiplier is 0.0, expected above 0"),
        ({"models": 1}, "dmm: models is 1, expected at least 2"),
        ({"loss": "kl"}, "dmm: loss is 'kl'"),
    ):
        with pytest.raises(PalimpsestError, match=message):
            DMM(**fields)
    with pytest.raises(PalimpsestError, match=r"the removal has shape \[1, 2\], the logits \[2, 2\]"):
        dm_direct(torch.zeros(2, 2), torch.zeros(1, 2))
