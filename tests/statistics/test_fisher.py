from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from memorised import people, quiet
from one_by_one import EVERY, loss_of, roughened, scale, slow_gradients, some_records
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.model import Model
from palimpsest.statistics import fisher as module
from palimpsest.statistics.fisher import Fisher, check_importances, diagonal_fisher


def close(found, expected, size):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("name", EVERY)
def test_per_sample_is_the_mean_of_squared_gradients(name):
    model, records = roughened(name), some_records(name)
    slow = slow_gradients(model, records)
    found = diagonal_fisher(model, records, quiet(), batch_size=4)
    close(found.values, {name: g.square().mean(0) for name, g in slow.items()}, scale(slow) ** 2)
    assert (found.examples, found.mode, found.model, found.batch_size) == (7, "per_sample", model.digest(), 0)


def test_per_sample_does_not_depend_on_batch_size_and_order():
    model, records = roughened("convnet"), some_records("convnet")
    one = diagonal_fisher(model, records, quiet(), batch_size=1)
    for other in (
        diagonal_fisher(model, records[::-1], quiet(), batch_size=3),
        diagonal_fisher(model, records, quiet(), batch_size=7),
    ):
        for name, value in one.values.items():
            torch.testing.assert_close(other.values[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_batches_of_one_are_single_samples(name):
    model, records = roughened(name), some_records(name)
    batch = diagonal_fisher(model, records, quiet(), "batch", batch_size=1)
    sample = diagonal_fisher(model, records, quiet())
    close(batch.values, sample.values, max(float(v.max()) for v in sample.values.values()))


@pytest.mark.parametrize("name", ["convnet", "llama"])
def test_batch_is_the_mean_over_batches_in_the_given_order(name, monkeypatch):
    monkeypatch.setattr(module, "POSITIONS", 20)  # a batch of sequences is put together from several parts
    model, records = roughened(name), some_records(name)
    weights = dict(model.network.named_parameters())
    expected = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for batch in (records[:3], records[3:6], records[6:]):
        loss = torch.stack([loss_of(model, record) for record in batch]).mean()
        for key, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            expected[key] += g.square() / 3  # the short last batch weighs as much as the others
    found = diagonal_fisher(model, records, quiet(), "batch", batch_size=3)
    close(found.values, expected, max(float(v.max()) for v in expected.values()))
    assert found.batch_size == 3
    other = diagonal_fisher(model, records[::-1], quiet(), "batch", batch_size=3)
    assert any(not torch.allclose(other.values[key], expected[key], rtol=0.1, atol=0) for key in expected)


def test_label_free_is_the_mean_absolute_gradient_of_the_squared_logits(vit):
    records = some_records("vit")
    weights = dict(vit.network.named_parameters())
    expected = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for batch in (records[:4], records[4:]):
        logits = vit.network(pixel_values=torch.stack([record.image for record in batch])).logits
        loss = logits.square().sum(1).mean()
        for key, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            expected[key] += g.abs() / 2
    found = diagonal_fisher(vit, records, quiet(), "label_free", batch_size=4)
    close(found.values, expected, max(float(v.max()) for v in expected.values()))
    relabelled = [dataclasses.replace(record, label=0) for record in records]
    again = diagonal_fisher(vit, relabelled, quiet(), "label_free", batch_size=4)
    assert all(torch.equal(again.values[key], found.values[key]) for key in found.values)


def test_the_mean_loss_weighs_long_answers_as_short_ones(llama):
    record = people()[:1]
    count = len(slow_targets(llama, record[0]))
    sums = diagonal_fisher(llama, record, quiet(), reduction="sum")
    means = diagonal_fisher(llama, record, quiet(), reduction="mean")
    for name, value in sums.values.items():
        torch.testing.assert_close(value, count**2 * means.values[name], rtol=1e-4, atol=1e-9)


def slow_targets(model, record):
    from palimpsest.data.encoding import Encoder

    return Encoder.of(model).record(record).targets


class _Softmax(torch.nn.Module):
    """A linear softmax regression on the pixels."""

    main_input_name, dtype = "pixel_values", torch.float32

    def __init__(self, pixels, classes):
        super().__init__()
        from transformers import PreTrainedConfig

        self.config = PreTrainedConfig(num_labels=classes)
        self.linear = torch.nn.Linear(pixels, classes)

    def forward(self, pixel_values):
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=self.linear(pixel_values.flatten(1)))


class _SoftmaxForImageClassification(_Softmax):
    pass


def test_a_linear_softmax_regression_has_its_closed_form():
    torch.manual_seed(0)
    model = Model(_SoftmaxForImageClassification(12, 4))
    records = [Record(image=torch.randn(3, 2, 2), label=i % 4) for i in range(9)]
    x = torch.stack([record.image.flatten() for record in records])
    with torch.no_grad():
        p = F.softmax(model.network.linear(x), 1)
    residual = p - F.one_hot(torch.tensor([record.label for record in records]), 4)
    found = diagonal_fisher(model, records, quiet())
    expected = (residual.square()[:, :, None] * x.square()[:, None, :]).mean(0)
    torch.testing.assert_close(found.values["linear.weight"], expected)
    torch.testing.assert_close(found.values["linear.bias"], residual.square().mean(0))


def test_frozen_and_unchosen_weights_have_zeros_in_their_place(llama):
    frozen = llama.network.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    found = diagonal_fisher(llama, people()[:2], quiet(), only=lambda name: "mlp" in name)
    assert list(found.values) == [name for name, _ in llama.network.named_parameters()]
    assert found.values["model.layers.1.mlp.up_proj.weight"].count_nonzero() == 0
    assert found.values["model.layers.1.mlp.down_proj.weight"].count_nonzero() > 0
    mlps = [value for name, value in found.values.items() if "mlp" in name]
    assert found.zeros >= llama.parameters - sum(value.numel() for value in mlps) + frozen.numel()


def test_half_precision_weights_have_float32_importances(llama):
    llama.network.to(torch.bfloat16)
    found = diagonal_fisher(llama, people()[:2], quiet())
    assert {value.dtype for value in found.values.values()} == {torch.float32}
    wide = diagonal_fisher(llama, people()[:2], quiet(), dtype=torch.float64)
    assert {value.dtype for value in wide.values.values()} == {torch.float64}


def test_the_network_carries_no_hook_and_no_gradient_afterwards(vit):
    for mode in ("per_sample", "batch", "label_free"):
        vit.network.train()
        diagonal_fisher(vit, some_records("vit"), quiet(), mode)
        assert vit.network.training
        assert no_hooks_left(vit.network)
        assert all(weight.grad is None for weight in vit.network.parameters())


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(llama):
    return diagonal_fisher(llama, people()[:3], quiet())


def test_a_file_gives_back_what_was_saved(measured, llama, tmp_path):
    path = measured.save(tmp_path / "deep" / "importance.safetensors")
    found = Fisher.load(path, llama)
    assert found.digest() == measured.digest()
    assert all(torch.equal(found.values[name], value) for name, value in measured.values.items())
    assert dataclasses.replace(found, values={}) == dataclasses.replace(measured, values={})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_digest_knows_values_and_origin(measured):
    changed = {name: value.clone() for name, value in measured.values.items()}
    next(iter(changed.values()))[0] += 1
    assert dataclasses.replace(measured, values=changed).digest() != measured.digest()
    assert dataclasses.replace(measured, examples=4).digest() != measured.digest()


def test_importances_of_another_model_are_refused(measured, llama, tmp_path):
    path = measured.save(tmp_path / "importance.safetensors")
    with torch.no_grad():
        llama.network.model.norm.weight[0] += 1
    with pytest.raises(PalimpsestError, match=r"belong to a model with weights .* Measure them again"):
        Fisher.load(path, llama)


def test_files_that_are_no_importances_are_refused(measured, tmp_path):
    with pytest.raises(PalimpsestError, match=r"none\.safetensors does not exist"):
        Fisher.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not at all")
    with pytest.raises(PalimpsestError, match="cannot be read as an importance file"):
        Fisher.load(tmp_path / "text")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PalimpsestError, match=r"other.safetensors is no importance file: its format is 'not stated'"):
        Fisher.load(tmp_path / "other.safetensors")
    path = measured.save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PalimpsestError, match="cannot be read as an importance file"):
        Fisher.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:1], r"norm.weight has shape \[1\], expected \[32\]"),
        (lambda v: v.half(), "norm.weight is float16, expected float32 or float64"),
        (lambda v: v.bfloat16(), "norm.weight is bfloat16, expected float32"),
        (lambda v: v.int(), "norm.weight is int32, expected float32"),
        (lambda v: v.fill_(float("nan")), "norm.weight has values that are not finite"),
        (lambda v: v.fill_(float("inf")), "norm.weight has values that are not finite"),
        (lambda v: v.neg(), "norm.weight has values below 0"),
    ],
)
def test_values_that_are_no_importances_are_refused(measured, llama, change, message):
    values = dict(measured.values)
    values["model.norm.weight"] = change(values["model.norm.weight"].clone() + 1e-3)
    with pytest.raises(PalimpsestError, match=message):
        check_importances(values, llama.network)


def test_names_must_be_those_of_the_model(measured, llama):
    values = dict(measured.values)
    del values["model.norm.weight"]
    with pytest.raises(PalimpsestError, match=r"importances: model.norm.weight is missing \(1 such names\)"):
        check_importances(values, llama.network)
    with pytest.raises(PalimpsestError, match=r"importances: more is unknown to the model"):
        check_importances({**measured.values, "more": torch.ones(1)}, llama.network)


def test_unknown_modes_and_sums_are_refused(llama):
    with pytest.raises(PalimpsestError, match=r"mode is 'sample'.*per_sample"):
        diagonal_fisher(llama, people()[:2], quiet(), "sample")
    with pytest.raises(PalimpsestError, match=r"dtype is torch\.float16"):
        diagonal_fisher(llama, people()[:2], quiet(), dtype=torch.float16)
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        diagonal_fisher(llama, [], quiet(), role="forget")
