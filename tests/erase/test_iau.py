from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import build_model
from memorised import people, quiet
from one_by_one import roughened, slow_gradients, some_records
from palimpsest.data.records import Record, Roles
from palimpsest.erase.iau import IAU, change, cosine, norm_of, retained_gradient, step
from palimpsest.errors import PalimpsestError
from palimpsest.ledger import Entry
from palimpsest.models.hooks import no_hooks_left
from palimpsest.statistics.per_example import mean_gradient
from palimpsest.statistics.predictions import classify
from palimpsest.statistics.training_gradient import TrainingGradient, training_gradient
from palimpsest.system import create, to_dict
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune
from palimpsest.write.iau_training import RestrictedTraining, gradient_restriction, twice_differentiable
from pictured import pictures, recognising

RATE = 0.01


class _Weights(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.w = nn.ParameterList(torch.tensor(value) for value in values)


def roles_of(name):
    """Seven records, two of them to be forgotten."""
    records = some_records(name)
    return Roles(train=records, forget=records[:2], retain=records[2:])


def notes(model):
    return model.ledger.entries[-1].notes


def moves(before, after):
    """What was added to every weight."""
    other = dict(after.network.named_parameters())
    return {name: (other[name] - weight).detach() for name, weight in before.network.named_parameters()}


def assert_same(first, second, **tolerance):
    other = dict(second.network.named_parameters())
    for name, weight in first.network.named_parameters():
        torch.testing.assert_close(other[name], weight, **tolerance)


# --- the mathematics -------------------------------------------------------------------------------------------------


def test_iau_matches_the_worked_example():
    """(theta - x)^2 / 2 on 0, 0, 0, 4: the optimum is 1, and without the 4 it is 0."""
    theta = torch.tensor([1.0])
    forget, total = theta - 4, theta - torch.tensor([0.0, 0, 0, 4]).mean()
    retain = retained_gradient(total, forget, examples=4, forgotten=1)
    assert (forget.item(), retain.item()) == (-3, 1)
    network = _Weights([1.0])
    assert step(network, {"w.0": retain - forget}, "sgd", 0.25) == 1
    assert network.w[0].item() == 0


@pytest.mark.parametrize("values", [[3.0, -0.5, 1e-3, -1e-7, 1e-9, 0.0]])
def test_adam1_is_the_first_step_of_a_fresh_adam(values):
    weight = nn.Parameter(torch.zeros(len(values)))
    weight.grad = torch.tensor(values)
    torch.optim.Adam([weight], lr=RATE).step()
    moved = change(torch.tensor(values), "adam1", RATE)
    torch.testing.assert_close(moved, weight.data, rtol=1e-5, atol=1e-7)
    g = torch.tensor(values)
    torch.testing.assert_close(moved, -RATE * g / (g.abs() + 1e-8), rtol=0, atol=1e-7)
    torch.testing.assert_close(moved[:2], change(g, "sign", RATE)[:2], rtol=1e-4, atol=0)
    assert moved[-1] == 0
    assert 0 < -moved[-2] < 0.1 * RATE


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=9),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_the_retain_gradient_comes_back_from_any_whole(rows, forgotten, retained):
    forget, retain = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    total = (forgotten * forget + retained * retain) / (forgotten + retained)
    found = retained_gradient(total, forget, forgotten + retained, forgotten)
    torch.testing.assert_close(found, retain, rtol=1e-9, atol=1e-9)


def test_cosines_and_norms_are_over_all_weights_together():
    first = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    second = {"a": torch.tensor([0.0, 7.0]), "b": torch.tensor([[2.0]])}
    assert norm_of(first) == pytest.approx(5)
    assert cosine(first, second) == pytest.approx(8 / (5 * math.sqrt(53)))
    assert cosine(first, {name: torch.zeros_like(g) for name, g in first.items()}) == 0


def test_where_training_has_converged_the_correction_only_rescales():
    """A logistic regression on fixed features, solved to the end."""
    model = build_model("vit")
    network = model.network.double().requires_grad_(False)
    head = network.classifier
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(240, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (240,), generator=generator)
    features = network.vit(pixel_values=images.double()).last_hidden_state[:, 0]
    shapes = (head.weight.shape, head.bias.shape)

    def loss(theta):
        weight, bias = (
            part.view(shape) for part, shape in zip(theta.split([shapes[0].numel(), 4]), shapes, strict=True)
        )
        return F.cross_entropy(features @ weight.T + bias, labels)

    theta = torch.cat([w.flatten() for w in head.parameters()])
    for _ in range(20):  # Newton's method: the features hardly differ, and nothing else gets to the end of it
        slope, curvature = torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)
        theta = theta - torch.linalg.pinv(curvature, rcond=1e-13, hermitian=True) @ slope
    nn.utils.vector_to_parameters(theta, head.parameters())
    head.requires_grad_(True)
    records = [Record(image=image, label=int(label)) for image, label in zip(images, labels, strict=True)]
    data = Roles(forget=records[:40], retain=records[40:])
    assert norm_of(mean_gradient(model, records, quiet())) < 1e-8
    edited = IAU(learning_rate=RATE).apply(model, data, quiet())
    found = notes(edited)
    assert found["alignment"] == pytest.approx(1, abs=1e-9)
    assert found["norms"]["update"] == pytest.approx((1 + 40 / 200) * found["norms"]["forget"], rel=1e-6)
    assert_same(edited, IAU(learning_rate=RATE, correction=0.0).apply(model, data, quiet()), rtol=0, atol=1e-6)
    assert notes(edited)["moved"] == pytest.approx(sum(w.numel() for w in head.parameters()) / model.parameters)


# --- on networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "vit", "llama", "moe"])
def test_the_step_is_that_of_an_optimiser_on_both_mean_losses(name):
    model, data = roughened(name), roles_of(name)
    forget, retain = (slow_gradients(model, data[role], "mean") for role in ("forget", "retain"))
    expected = {key: retain[key].mean(0) - forget[key].mean(0) for key in forget}
    sgd = moves(model, IAU(rule="sgd", learning_rate=1.0).apply(model, data, quiet()))
    adam = moves(model, IAU(learning_rate=RATE).apply(model, data, quiet()))
    large = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    for key, g in expected.items():
        torch.testing.assert_close(sgd[key], -g, rtol=1e-3, atol=1e-5)
        clear = g.abs() > large
        torch.testing.assert_close(adam[key][clear], -RATE * g[clear].sign(), rtol=1e-2, atol=0)
        assert (adam[key].abs() <= RATE * 1.001).all()


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_neither_batches_nor_a_stored_gradient_change_the_result(name, tmp_path):
    model, data = roughened(name), roles_of(name)
    whole = IAU(rule="sgd", learning_rate=1.0).apply(model, data, quiet())
    single = IAU(rule="sgd", learning_rate=1.0, batch_size=1).apply(model, data, quiet())
    assert_same(whole, single, rtol=0, atol=1e-6)
    path = training_gradient(model, data.train, quiet()).save(tmp_path / "gradient.safetensors")
    stored = IAU(rule="sgd", learning_rate=1.0, cached_gradient=str(path))
    cached = stored.apply(model, Roles(forget=data.forget), quiet())
    assert_same(whole, cached, rtol=0, atol=2e-6)
    assert notes(cached)["examples"] == notes(whole)["examples"] == {"forget": 2, "retain": 5}
    assert notes(cached)["norms"]["retain"] == pytest.approx(notes(whole)["norms"]["retain"], rel=1e-4)


def test_without_correction_it_is_gradient_ascent_and_needs_no_retain_set(vit):
    data = roles_of("vit")
    alone = IAU(rule="sgd", learning_rate=1.0, correction=0.0).apply(vit, Roles(forget=data.forget), quiet())
    forget = mean_gradient(vit, data.forget, quiet())
    for name, moved in moves(vit, alone).items():
        torch.testing.assert_close(moved, forget[name], rtol=1e-4, atol=1e-6)
    assert notes(alone)["alignment"] == pytest.approx(1)
    assert notes(IAU().apply(vit, data, quiet()))["alignment"] < 0.999


def test_the_correction_is_weighed(vit):
    data = roles_of("vit")
    edited = IAU(rule="sgd", learning_rate=1.0, correction=3.0).apply(vit, data, quiet())
    forget, retain = (mean_gradient(vit, data[role], quiet()) for role in ("forget", "retain"))
    for name, moved in moves(vit, edited).items():
        torch.testing.assert_close(moved, forget[name] - 3 * retain[name], rtol=1e-4, atol=1e-6)


def test_a_part_of_the_retain_set_is_drawn_from_the_seed(vit):
    data = roles_of("vit")
    method = IAU(rule="sgd", learning_rate=1.0, retain_fraction=0.4)
    first, again, other = (method.apply(vit, data, quiet(seed=seed)) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    assert notes(first)["examples"] == {"forget": 2, "retain": 2}
    forget = mean_gradient(vit, data.forget, quiet())
    estimates = []
    for i in range(len(data.retain)):
        for j in range(i):
            g = mean_gradient(vit, [data.retain[j], data.retain[i]], quiet())["classifier.bias"]
            estimates.append(forget["classifier.bias"] - g)
    moved = moves(vit, first)["classifier.bias"]
    assert min(float((moved - estimate).abs().max()) for estimate in estimates) < 1e-5


def test_batch_normalisation_keeps_its_statistics_and_the_model_its_mode(convnet):
    convnet.network.train()
    edited = IAU(learning_rate=RATE).apply(convnet, roles_of("convnet"), quiet())
    assert all(module.training for module in convnet.network.modules())
    after = dict(edited.network.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in convnet.network.named_buffers())
    assert no_hooks_left(edited.network)


def test_only_weights_that_train_move(vit):
    for name, weight in vit.network.named_parameters():
        weight.requires_grad_(name.startswith("classifier"))
    edited = IAU(learning_rate=RATE).apply(vit, roles_of("vit"), quiet())
    changed = {name for name, moved in moves(vit, edited).items() if moved.any()}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_tied_embeddings_move_once():
    model = roughened("llama")
    edited = IAU(rule="sign", learning_rate=RATE).apply(model, roles_of("llama"), quiet()).network
    assert edited.lm_head.weight is edited.model.embed_tokens.weight
    moved = (edited.lm_head.weight - model.network.lm_head.weight).detach().abs()
    assert float(moved.max()) == pytest.approx(RATE, rel=1e-3)


def test_the_forget_set_fades_more_than_the_rest():
    model, data = recognising("vit"), pictures()
    edited = IAU(learning_rate=3e-3).apply(model, data, quiet())

    def loss(model, role):
        return float(classify(model, data[role], quiet()).nll.mean())

    rise = {role: loss(edited, role) - loss(model, role) for role in ("forget", "retain")}
    assert rise["forget"] > 0.1
    assert rise["retain"] < 0.2 * rise["forget"]


def test_the_ledger_says_how_the_step_was(vit):
    edited = IAU().apply(vit, roles_of("vit"), quiet())
    found = notes(edited)
    changed = sum(int((moved != 0).sum()) for moved in moves(vit, edited).values())
    assert found["moved"] == pytest.approx(changed / vit.parameters)
    assert -1 <= found["alignment"] <= 1
    assert set(found["norms"]) == {"forget", "retain", "update"}
    entry = edited.ledger.entries[-1]
    assert Entry(**json.loads(json.dumps(dataclasses.asdict(entry)))) == entry
    method = IAU(rule="sgd", retain_fraction=0.5)
    assert create("iau", **json.loads(json.dumps(to_dict(method)))) == method


def test_a_step_below_the_precision_of_the_weights_is_said():
    model = build_model("vit")
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.fill_(1.0)
    edited = IAU(learning_rate=1e-9).apply(model, roles_of("vit"), quiet())
    assert notes(edited)["moved"] == 0
    assert "no weight was changed" in notes(edited)["warnings"][0]


# --- gradient restriction --------------------------------------------------------------------------------------------


SHORT = Training(learning_rate=1e-3, epochs=3, batch_size=4, weight_decay=0.0, warmup_epochs=0.0)


def test_the_penalty_is_the_sum_of_the_norms_or_the_norm_of_all():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1))]
    loss = weights[0] @ torch.tensor([3.0, 4.0]) + weights[1] @ torch.tensor([5.0, 12.0])
    assert gradient_restriction(loss, weights).item() == pytest.approx(18)
    assert gradient_restriction(loss, weights, "global").item() == pytest.approx(math.sqrt(194))
    alone = weights[0] @ torch.tensor([3.0, 4.0])
    assert gradient_restriction(alone, weights[:1]) == gradient_restriction(alone, weights[:1], "global")


def test_where_the_gradient_vanishes_the_penalty_has_one_too():
    weight = nn.Parameter(torch.zeros(3))
    gradient_restriction(weight.square().sum(), [weight]).backward()
    assert weight.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("norm", ["per_tensor", "global"])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_penalty_has_the_gradient_of_its_finite_differences(name, norm):
    model = roughened(name)
    network = model.network.double()
    weights = list(network.parameters())
    data = roles_of(name).forget
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]

    def penalty():
        if name == "vit":
            inputs = {"pixel_values": torch.stack([record.image for record in data]).double()}
            loss = F.cross_entropy(network(**inputs).logits, torch.tensor([record.label for record in data]))
        else:
            tokens = model.tokenizer([data[0].prompt], return_tensors="pt").input_ids
            loss = F.cross_entropy(network(input_ids=tokens).logits[0, :-1], tokens[0, 1:])
        return gradient_restriction(loss, weights, norm)

    with twice_differentiable():
        found = torch.autograd.grad(penalty(), weights, allow_unused=True)
        slope = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True) if g is not None)
        small, ends = 1e-4, []  # the norms of llama compute in float32
        for sign in (1, -1):
            with torch.no_grad():
                for weight, d in zip(weights, directions, strict=True):
                    weight.add_(sign * small * d)
            ends.append(float(penalty().detach()))
            with torch.no_grad():
                for weight, d in zip(weights, directions, strict=True):
                    weight.sub_(sign * small * d)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * small), rel=1e-3)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_without_restriction_training_is_plain_to_the_last_bit(name):
    model, data = build_model(name), Roles(train=roles_of(name).train)
    plain = Finetune(training=SHORT).apply(model, data, quiet())
    assert RestrictedTraining(restriction=0.0, training=SHORT).apply(model, data, quiet()).digest() == plain.digest()
    assert RestrictedTraining(training=SHORT).apply(model, data, quiet()).digest() != plain.digest()


def test_a_step_is_restricted_as_a_whole_however_little_fits_in_memory():
    model, data = build_model("llama"), Roles(train=people()[:4])
    little = dataclasses.replace(SHORT, micro_tokens=1)
    whole, cut = (RestrictedTraining(training=t).apply(model, data, quiet()) for t in (SHORT, little))
    assert whole.digest() == cut.digest()


def test_restriction_leaves_smaller_gradients():
    data = Roles(train=pictures().train)
    longer = dataclasses.replace(SHORT, epochs=15, batch_size=16)

    def gradient(restriction):
        method = RestrictedTraining(restriction=restriction, training=longer)
        model = method.apply(build_model("vit"), data, quiet())
        return norm_of(mean_gradient(model, data.train, quiet()))

    assert gradient(0.1) < 0.7 * gradient(0.0)


def test_what_cannot_be_differentiated_twice_is_named(vit):
    """Fused attention where it was not turned off, and a function that forbids it."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Head(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    images = torch.stack([record.image for record in some_records("vit")[:2]])
    loss = F.cross_entropy(vit.network(pixel_values=images).logits, torch.tensor([0, 1]))
    with (
        pytest.raises(PalimpsestError, match=r'cannot .*Load the model with attn_implementation="eager"'),
        twice_differentiable(),
    ):
        gradient_restriction(loss, list(vit.network.parameters())).backward()
    vit.network.classifier = Head(32, 4)
    with pytest.raises(PalimpsestError, match="differentiates twice, which a part of the network cannot"):
        RestrictedTraining(training=SHORT).apply(vit, Roles(train=some_records("vit")), quiet())


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"), twice_differentiable():
        raise RuntimeError("something else")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_the_rate_must_be_above_0(rate):
    with pytest.raises(PalimpsestError, match=r"iau: learning_rate is .*, expected"):
        IAU(learning_rate=rate)
    with pytest.raises(PalimpsestError, match="iau: learning_rate is"):
        step(_Weights([1.0]), {"w.0": torch.ones(1)}, "sgd", rate)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "adam"}, 'Did you mean "adam1"'),
        ({"correction": -1.0}, r"correction is -1\.0, expected at least 0"),
        ({"retain_fraction": 0.0}, r"retain_fraction is 0\.0, expected above 0"),
        ({"retain_fraction": 1.5}, r"retain_fraction is 1\.5, expected at most 1"),
        ({"retain_fraction": 0.5, "cached_gradient": "x"}, "retain_fraction must be 1"),
        ({"retain_fraction": 0.5, "correction": 0.0}, "with correction 0 neither"),
        ({"cached_gradient": "x", "correction": 0.0}, "with correction 0 neither"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(PalimpsestError, match=message):
        IAU(**fields)


def test_a_negative_restriction_is_refused():
    with pytest.raises(PalimpsestError, match=r"restriction is -0\.1, expected at least 0"):
        RestrictedTraining(restriction=-0.1)


def test_missing_and_overlapping_sets_are_named(vit):
    data = roles_of("vit")
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        IAU().apply(vit, Roles(forget=[], retain=data.retain), quiet())
    with pytest.raises(PalimpsestError, match="the retain set is empty"):
        IAU().apply(vit, Roles(forget=data.forget, retain=[]), quiet())
    with pytest.raises(PalimpsestError, match='iau needs the role "retain", or a stored gradient'):
        IAU().apply(vit, Roles(forget=data.forget), quiet())
    with pytest.raises(PalimpsestError, match="forget and retain share 2 records"):
        IAU().apply(vit, Roles(forget=data.forget, retain=data.train), quiet())


def test_a_model_without_weights_that_train_is_refused(vit):
    vit.network.requires_grad_(False)
    with pytest.raises(PalimpsestError, match="no weight of ViTForImageClassification is left: none trains"):
        IAU().apply(vit, roles_of("vit"), quiet())


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_a_loss_that_is_no_number_is_named(vit, role):
    data = roles_of("vit")
    broken = [Record(image=torch.full((3, 16, 16), 3e38), label=0)]
    with pytest.raises(PalimpsestError, match=f"the loss on {role} has no finite gradient at"):
        IAU().apply(vit, data.replace(**{role: broken}), quiet())
    with pytest.raises(PalimpsestError, match="the loss on train has no finite gradient"):
        training_gradient(vit, broken, quiet())


def test_a_stored_gradient_that_does_not_fit_is_refused(vit, tmp_path):
    data = roles_of("vit")
    forget = Roles(forget=data.forget)
    path = training_gradient(vit, data.train, quiet()).save(tmp_path / "gradient.safetensors")
    method = IAU(cached_gradient=str(path))
    with pytest.raises(PalimpsestError, match="the stored gradient belongs to a model with weights"):
        method.apply(roughened("vit"), forget, quiet())
    with pytest.raises(PalimpsestError, match=r"1 forget records are not among .*\(first: \"an image\"\)"):
        method.apply(vit, Roles(forget=[data.forget[0], Record(image=torch.zeros(3, 16, 16), label=0)]), quiet())
    with pytest.raises(PalimpsestError, match="nothing is retained: all 7 records"):
        method.apply(vit, Roles(forget=data.train), quiet())
    with pytest.raises(PalimpsestError, match="does not exist"):
        IAU(cached_gradient=str(tmp_path / "none")).apply(vit, forget, quiet())
    vit.network.classifier.requires_grad_(False)
    with pytest.raises(PalimpsestError, match="not that of the weights that train now"):
        method.apply(vit, forget, quiet())


def test_a_stored_gradient_of_another_loss_is_refused(tmp_path):
    model, data = build_model("llama"), roles_of("llama")
    path = training_gradient(model, data.train, quiet(), reduction="sum").save(tmp_path / "gradient.safetensors")
    with pytest.raises(PalimpsestError, match="the stored gradient has reduction sum, expected mean"):
        IAU(cached_gradient=str(path)).apply(model, Roles(forget=data.forget), quiet())


def test_what_is_no_gradient_file_is_refused(vit, tmp_path):
    from palimpsest.statistics.fisher import diagonal_fisher

    other = diagonal_fisher(vit, some_records("vit"), quiet()).save(tmp_path / "fisher.safetensors")
    with pytest.raises(PalimpsestError, match="is no gradient file: its format is 'palimpsest-fisher-1'"):
        TrainingGradient.load(other, vit)
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(PalimpsestError, match="cannot be read as a gradient file"):
        TrainingGradient.load(tmp_path / "noise", vit)
