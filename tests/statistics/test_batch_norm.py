"""Running averages of batch norms after their network's weights were edited."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from conftest import build_model
from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.keep.lines import LiNeS
from palimpsest.keep.merging import Merge
from palimpsest.statistics.batch_norm import has_averages, recompute_averages
from pictured import pictures, recognising

DATA = pictures()


def first_norm(model):
    return model.network.resnet.embedder.embedder.normalization


def test_the_averages_are_those_of_the_training_images():
    model = build_model("convnet")
    norm = first_norm(model)
    seen = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(args[0].transpose(0, 1).flatten(1)))
    recompute_averages(model, DATA, quiet(), "lines")
    handle.remove()
    assert sum(part.shape[1] for part in seen) == len(DATA.train) * seen[0].shape[1] // (len(DATA.train) // len(seen))
    assert_close(norm.running_mean, torch.stack([part.mean(1) for part in seen]).mean(0))
    assert_close(norm.running_var, torch.stack([part.var(1) for part in seen]).mean(0))
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.network.modules())


def test_weights_stay_and_so_does_the_order_of_batches():
    one, two = build_model("convnet"), build_model("convnet")
    before = {name: weight.clone() for name, weight in one.network.named_parameters()}
    recompute_averages(one, DATA, quiet(), "lines")
    recompute_averages(two, DATA, quiet(), "lines")
    for name, weight in one.network.named_parameters():
        assert torch.equal(weight, before[name])
    assert torch.equal(first_norm(one).running_var, first_norm(two).running_var)


@pytest.mark.parametrize("method", [LiNeS(alpha=0.5), Merge()], ids=["lines", "merge"])
def test_an_edited_classifier_gets_averages_of_its_own(method, tmp_path):
    start = build_model("convnet").save_pretrained(tmp_path / "start")
    tuned = recognising("convnet")
    method = dataclasses.replace(method, base=str(start))
    plain = method.apply(tuned, Roles(), quiet())
    assert torch.equal(first_norm(plain).running_mean, first_norm(tuned).running_mean)
    assert any("running averages of the batch norms" in text for text in plain.ledger.entries[-1].notes["warnings"])
    renewed = method.apply(tuned, Roles(train=DATA.train), quiet())
    expected = plain.copy()
    recompute_averages(expected, DATA, quiet(), "lines")
    assert_close(first_norm(renewed).running_mean, first_norm(expected).running_mean)
    assert not torch.allclose(first_norm(renewed).running_mean, first_norm(plain).running_mean)


def test_networks_without_batch_norms_need_no_data():
    model, run = build_model("vit"), quiet()
    assert not has_averages(model.network)
    recompute_averages(model, Roles(), run, "lines")
    assert "warnings" not in run.notes


def test_one_record_has_no_variance():
    with pytest.raises(PalimpsestError, match="need at least 2 records in train"):
        recompute_averages(build_model("convnet"), Roles(train=DATA.train[:1]), quiet(), "lines")
