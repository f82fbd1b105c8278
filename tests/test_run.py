from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import transformers

from conftest import build_tokenizer
from memorised import data, quiet, reciting
from palimpsest.data.records import Roles
from palimpsest.erase.npo import NPO
from palimpsest.erase.rmu import RMU
from palimpsest.erase.whp import WHP
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, create, system
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune


@system("noting", verb="erase", title="Noting", paper="", takes="causal-lm", needs={"forget"}, fidelity="adapted")
class Noting(Method):
    """Changes nothing and says so."""

    def apply(self, model, data: Roles, run: Run):
        run.note(curve=torch.tensor([0.5, 0.25]), map=np.eye(2), share=0.25, layers={0: (1, 2)})
        run.warn("nothing was changed")
        return model.copy()


def test_what_a_method_notes_is_in_its_ledger_entry_as_plain_json():
    notes = Noting().apply(reciting(), data(), quiet()).ledger.entries[-1].notes
    expected = {"curve": [0.5, 0.25], "map": [[1, 0], [0, 1]], "share": 0.25, "layers": {"0": [1, 2]}}
    assert json.loads(json.dumps(notes)) == {**expected, "warnings": ["nothing was changed"]}


def test_notes_of_one_method_are_not_those_of_the_next():
    run = quiet()
    first = Noting().apply(reciting(), data(), run)
    second = Noting().apply(first, data(), run)
    assert [entry.notes["warnings"] for entry in second.ledger.entries[-2:]] == [["nothing was changed"]] * 2
    assert not run.notes


def test_what_cannot_be_computed_with_is_refused():
    with pytest.raises(PalimpsestError, match="precision is 'fp16'"):
        Run(precision="fp16")
    with pytest.raises(PalimpsestError, match="the device 'gpu' cannot be used here"):
        Run(device="gpu").torch_device()


def test_a_negative_seed_is_refused():
    with pytest.raises(PalimpsestError, match="seed is -1, expected a whole number of 0 or more"):
        Run(seed=-1)


def test_random_numbers_of_the_user_go_on_as_they_were():
    def drawn(work) -> list[float]:
        random.seed(5), np.random.seed(6), torch.manual_seed(7)
        work()
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    learn = Finetune(training=Training(epochs=1, max_steps=1))
    assert drawn(lambda: learn.apply(reciting(), Roles(train=data().retain), quiet())) == drawn(lambda: None)


def with_dropout(training: bool) -> Model:
    sizes = {"vocab_size": 256, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    return Model(network.train(training), build_tokenizer())


@pytest.mark.parametrize("method", [RMU, WHP, NPO])
def test_a_method_does_not_depend_on_the_mode_of_the_model_and_leaves_it(method):
    training = Training(learning_rate=1e-3, epochs=2, batch_size=4, warmup_epochs=0.0)
    fields = {"training": training} | ({"reinforce": training} if method is WHP else {})
    given = with_dropout(training=True)
    after = method(**fields).apply(given, data(), quiet())
    assert after.digest() == method(**fields).apply(with_dropout(training=False), data(), quiet()).digest()
    assert all(module.training for module in given.network.modules())
    assert not any(module.training for module in after.network.modules())


def test_a_probe_leaves_the_mode_of_the_model():
    given, gold = with_dropout(training=True), with_dropout(training=True)
    create("answer-probability").measure(given, data(), quiet(), gold)
    assert all(module.training for model in (given, gold) for module in model.network.modules())
