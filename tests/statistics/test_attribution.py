from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from conftest import build_model
from memorised import quiet
from one_by_one import roughened, some_records
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.statistics.attribution import Datamodel, calibrated, family, names_of, regression, slope, trak
from palimpsest.statistics.ensemble import subsets
from palimpsest.statistics.predictions import margins
from palimpsest.statistics.projection import DenseProjection, projected_gradients
from pictured import pictures, recognising

TRAIN, POINTS, CLASSES = 12, 9, 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coin_masks(models=80, seed=1):
    return torch.rand(models, TRAIN, generator=torch.Generator().manual_seed(seed)) < 0.5


def world(masks, seed=2):
    """Outputs that are exactly sums of contributions, and the contributions."""
    b = draw(TRAIN, POINTS, CLASSES, seed=seed)
    return draw(POINTS, CLASSES, seed=9) + (masks.double() @ b.flatten(1)).view(-1, POINTS, CLASSES), b


def known(b, **fields):
    names = tuple("abcdefghijkl")
    return Datamodel(**{"contributions": b, "train": names, "points": names[:POINTS], "family": "x", **fields})


# --- regression -------------------------------------------------------------------------------------------------------


def test_in_an_additive_world_removal_is_retraining():
    masks = coin_masks()
    outputs, b = world(masks)
    found = regression(masks, outputs, ridge=0.0)
    torch.testing.assert_close(found, b, rtol=0, atol=1e-6)
    whole, without = torch.ones(2, TRAIN, dtype=torch.bool)
    without[[3, 7]] = False
    full, retrained = world(torch.stack([whole, without]))[0]
    direct = full - known(found).predict_removal([3, 7])
    torch.testing.assert_close(direct, retrained, rtol=0, atol=1e-6)


def test_the_closed_form_is_ridge_regression_with_an_intercept():
    from sklearn.linear_model import Ridge

    masks = coin_masks(40)
    outputs = draw(40, POINTS, CLASSES)
    expected = Ridge(alpha=7.0).fit(masks.numpy().astype(float), outputs.flatten(1).numpy()).coef_.T
    torch.testing.assert_close(regression(masks, outputs, 7.0).flatten(1), torch.from_numpy(expected))


def test_a_larger_ridge_shrinks_and_the_multiplier_makes_up_for_it():
    masks, held_out = coin_masks(400), coin_masks(50, seed=3)
    outputs, _ = world(masks)
    told, _ = world(held_out)
    slopes = [slope(known(regression(masks, outputs, ridge)), held_out, told) for ridge in (0.0, 100.0)]
    assert slopes[0] == pytest.approx(1, abs=1e-5)
    assert slopes[1] == pytest.approx(2, rel=0.1)  # r = 100 beside 400 / 4
    made = calibrated(known(regression(masks, outputs, 100.0)), held_out, told)
    assert made.multiplier == slopes[1]
    plain = dataclasses.replace(made, multiplier=1.0)
    torch.testing.assert_close(made.predict_removal([0, 1]), slopes[1] * plain.predict_removal([0, 1]))


def test_ridge_regression_as_training():
    """Of linear least squares the exact leave-group-out datamodel gives the closed-form refit."""
    x, y, forget = draw(TRAIN, 4), draw(TRAIN, CLASSES, seed=1), [2, 5, 6]

    def refit(kept):
        return torch.linalg.solve(x[kept].T @ x[kept] + 0.3 * torch.eye(4), x[kept].T @ y[kept])

    everyone = list(range(TRAIN))
    removed = x[:POINTS] @ (refit(everyone) - refit([i for i in everyone if i not in forget]))
    b = torch.zeros(TRAIN, POINTS, CLASSES, dtype=torch.float64)
    # the change of a group, shared out over its members by their leverage in the refit without them
    kept = torch.linalg.inv(x.T @ x - x[forget].T @ x[forget] + 0.3 * torch.eye(4))
    residual = y[forget] - x[forget] @ refit(everyone)
    b[forget] = torch.einsum("pd,gd,gc->gpc", x[:POINTS] @ kept, x[forget], residual)
    direct = x[:POINTS] @ refit(everyone) - known(b).predict_removal(forget)
    torch.testing.assert_close(direct, x[:POINTS] @ refit(everyone) - removed)


def test_slope_looks_at_the_records_left_out_of_each_model():
    masks, b = coin_masks(60), draw(TRAIN, POINTS, CLASSES)
    outputs, _ = world(masks)
    inside = masks[:, :POINTS, None].expand(outputs.shape)
    predicted = (masks.double() @ b.flatten(1)).view(outputs.shape)
    true, told = (z - z.mean(0) for z in (outputs, predicted))
    expected = (true * told)[~inside].sum() / told.square()[~inside].sum()
    assert slope(known(b), masks, outputs) == pytest.approx(float(expected), rel=1e-4)


def test_removal_of_nothing_is_nothing_and_of_a_group_is_the_sum():
    datamodel = known(draw(TRAIN, POINTS, CLASSES), multiplier=0.5)
    assert not datamodel.predict_removal([]).any()
    expected = 0.5 * datamodel.contributions[[4, 1]].sum(0)[[8, 0]]
    torch.testing.assert_close(datamodel.predict_removal([4, 1], [8, 0]), expected)
    assert not dataclasses.replace(datamodel, multiplier=0.0).predict_removal([4]).any()


def test_sums_of_halves_are_not_in_halves():
    many = Datamodel(
        contributions=torch.full((3000, 1, 2), 0.1, dtype=torch.float16),
        train=tuple(map(str, range(3000))),
        points=("0",),
        family="x",
    )
    expected = 2999 * float(torch.tensor(0.1, dtype=torch.float16))  # sums of 256 of them are no float16 any more
    assert many.predict_removal(range(2999)).tolist() == [[pytest.approx(expected, rel=1e-6)] * 2]


# --- TRAK -------------------------------------------------------------------------------------------------------------


def by_hand(model, train, points, run, number, damping):
    """The definition for one model, a record at a time."""
    p = DenseProjection(64, seed=run.seed + number)
    phi = projected_gradients(model, train, run, p, loss=margins).double()
    pixels = torch.stack([record.image for record in train])
    labels = torch.tensor([record.label for record in train])
    with torch.no_grad():
        chance = model.network(pixel_values=pixels).logits.double().softmax(-1)[range(len(train)), labels]
    kernel = phi.T @ phi + damping * phi.square().sum(1).mean() * torch.eye(64)
    out = torch.zeros(len(train), len(points), 4, dtype=torch.float64)
    for c in range(4):
        g = projected_gradients(model, points, run, p, loss=lambda z, y, c=c: z[:, c]).double()
        out[..., c] = ((g @ torch.linalg.inv(kernel) @ phi.T) * (1 - chance)).T
    return out


def test_trak_is_its_definition_averaged_over_the_models_that_learned_the_record():
    models, records = [roughened("vit"), recognising("vit")], list(some_records("vit"))
    masks = torch.tensor([[1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).bool()
    found = trak(models, masks, records, records[:2], quiet(), size=64, damping=0.5)
    one, two = (by_hand(m, records, records[:2], quiet(), k, 0.5) for k, m in enumerate(models))
    expected = (one + two) / 2
    expected[0], expected[3] = one[0], two[3]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_trak_knows_which_records_teach_a_label():
    model, roles = recognising("convnet"), pictures()
    b = trak([model], torch.ones(1, 32, dtype=torch.bool), roles.train, roles.test, quiet())
    own = torch.tensor([record.label for record in roles.train])
    for record, at in zip(roles.test, b.unbind(1), strict=True):
        support = at[:, record.label]
        assert support[own == record.label].mean() > support[own != record.label].mean()


# --- what is stored ---------------------------------------------------------------------------------------------------


def stored():
    roles = pictures()
    return Datamodel(
        contributions=0.01 * draw(32, 20, 4).float(),
        train=names_of(roles.train),
        points=names_of(roles.train[:20]),
        family=family(build_model("vit")),
        multiplier=1.25,
    )


def test_a_file_gives_back_what_was_saved(tmp_path):
    datamodel = stored()
    loaded = Datamodel.load(datamodel.save(tmp_path / "folder" / "d.safetensors"))
    assert loaded.contributions.dtype == torch.float16
    torch.testing.assert_close(loaded.contributions.float(), datamodel.contributions, rtol=1e-3, atol=1e-6)
    same = dataclasses.replace(loaded, contributions=datamodel.contributions)
    assert same == datamodel
    loaded.check(build_model("vit"), pictures().train[::-1])  # the order of the data does not matter


def test_records_are_found_whatever_their_place():
    datamodel, train = stored(), pictures().train
    assert datamodel.known([train[7], train[7], train[0]]).tolist() == [7, 7, 0]
    assert datamodel.forgotten([train[30], train[2]]).tolist() == [2, 30]


def test_copies_of_a_record_go_together():
    train = pictures().train[:3]
    names = names_of([*train, train[0]])
    datamodel = Datamodel(contributions=torch.ones(4, 1, 2), train=names, points=names[:1], family="x")
    assert datamodel.forgotten([train[0], train[0]]).tolist() == [0, 3]
    assert datamodel.forgotten([train[0]]).tolist() == [0, 3]


def test_another_model_or_other_data_is_refused():
    datamodel, train = stored(), pictures().train
    with pytest.raises(PalimpsestError, match=r"is about ViTForImageClassification .*, but the model is ResNetFor"):
        datamodel.check(build_model("convnet"), train)
    with pytest.raises(PalimpsestError, match=r"other training data: 32 records with digest .*, given are 31 with"):
        datamodel.check(build_model("vit"), train[:-1])
    other = dataclasses.replace(datamodel, contributions=torch.zeros(32, 20, 5))
    with pytest.raises(PalimpsestError, match="the datamodel has 5 classes, the model 4"):
        other.check(build_model("vit"), train)


def test_records_that_it_does_not_know_are_refused():
    datamodel, roles = stored(), pictures()
    with pytest.raises(PalimpsestError, match=r'forget record "an image" \(1 times .*\) is not in the training data'):
        datamodel.forgotten(roles.test[:1])
    with pytest.raises(PalimpsestError, match=r"\(2 times in the forget set\) is 1 times in the training data"):
        datamodel.forgotten([roles.train[0], roles.train[0]])
    with pytest.raises(PalimpsestError, match="the forget set has 33 records, more than the 32 of the training data"):
        datamodel.forgotten([*roles.train, roles.train[0]])
    with pytest.raises(
        PalimpsestError, match='the record "a text" is not among the 20 points that the datamodel knows'
    ):
        datamodel.known([roles.train[0], Record(text="a text")])


def test_what_is_no_datamodel_file_is_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    with pytest.raises(PalimpsestError, match=r"the datamodel file .* does not exist"):
        Datamodel.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(PalimpsestError, match="cannot be read as a datamodel file"):
        Datamodel.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(PalimpsestError, match="is no datamodel file: its format is 'not stated'"):
        Datamodel.load(path)
    facts = {"format": "palimpsest-datamodel-1", "train": "a b", "points": "a", "family": "x", "multiplier": "1.0"}
    save_file({"contributions": torch.ones(2, 1, 2)}, path, metadata={**facts, "data": "another"})
    with pytest.raises(PalimpsestError, match="is damaged: its training records are not those of its digest"):
        Datamodel.load(path)


# --- bad input --------------------------------------------------------------------------------------------------------

HALVES = subsets(30, TRAIN, 6, torch.Generator().manual_seed(0))
OUTPUTS = draw(30, POINTS, CLASSES)


def constant(value):
    masks = coin_masks(30)
    masks[:, 4] = value
    return masks


@pytest.mark.parametrize(
    ("masks", "outputs", "ridge", "message"),
    [
        (HALVES, OUTPUTS, -1.0, "ridge is -1.0, expected at least 0"),
        (HALVES, OUTPUTS, float("nan"), "ridge is nan, expected at least 0"),
        (constant(True), OUTPUTS, 1.0, "training record 4 is in every subset"),
        (constant(False), OUTPUTS, 1.0, "training record 4 is in no subset"),
        (HALVES, OUTPUTS, 0.0, r"30 masks do not tell 12 records apart. Raise ridge \(0\)"),  # equally large
        (HALVES[:9], OUTPUTS[:9], 0.0, "9 masks do not tell 12 records apart"),
        (HALVES[:1], OUTPUTS[:1], 1.0, "needs at least two models"),
        (HALVES.float(), OUTPUTS, 1.0, "masks are torch.float32 .*, expected booleans"),
        (HALVES, OUTPUTS[:7], 1.0, "of as many models"),
        (HALVES, OUTPUTS[..., :1], 1.0, "the outputs have one class"),
        (HALVES, OUTPUTS.clone().fill_(torch.nan), 1.0, "some outputs are not finite"),
    ],
)
def test_data_that_cannot_be_fitted_is_named(masks, outputs, ridge, message):
    with pytest.raises(PalimpsestError, match=message):
        regression(masks, outputs, ridge)


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ([12], "names a record outside 0 to 11"),
        ([-1], "names a record outside 0 to 11"),
        ([3, 3], "names a record twice"),
    ],
)
def test_places_that_are_none_are_refused(forget, message):
    with pytest.raises(PalimpsestError, match=f"the forget set {message}"):
        known(draw(TRAIN, POINTS, CLASSES)).predict_removal(forget)


def test_other_bad_input_is_named(tmp_path):
    b = draw(TRAIN, POINTS, CLASSES)
    with pytest.raises(
        PalimpsestError, match=r"contributions have shape \[9, 9, 3\], expected \[12, 9\] and the classes"
    ):
        known(b[:9])
    with pytest.raises(PalimpsestError, match="some contributions of the forget set are not finite"):
        known(b.clone().fill_(torch.inf)).predict_removal([0])
    with pytest.raises(PalimpsestError, match="do not fit into float16"):
        known(1e6 * b).save(tmp_path / "d.safetensors")
    with pytest.raises(PalimpsestError, match=r"do not fit contributions \[12, 9, 3\]"):
        slope(known(b), HALVES, OUTPUTS[:, :5])
    with pytest.raises(PalimpsestError, match="the calibration has nothing to compare"):
        slope(known(torch.zeros_like(b)), HALVES, OUTPUTS)
    model, records, one = build_model("vit"), some_records("vit"), torch.ones(1, 7, dtype=torch.bool)
    for masks, damping, message in (
        (one, 0.0, "damping is 0.0, expected above 0"),
        (one[:, :3], 1.0, r"masks have shape \[1, 3\], expected \[1, 7\]"),
        (one & (torch.arange(7) != 2), 1.0, "training record 2 is in no subset: it has no gradient"),
    ):
        with pytest.raises(PalimpsestError, match=message):
            trak([model], masks, records, records, quiet(), damping=damping)
