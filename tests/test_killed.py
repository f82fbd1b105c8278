"""A method that was killed goes on from its last checkpoint: the same weights and the same notes as without."""

from __future__ import annotations

import dataclasses

import pytest

from conftest import SENTENCES, build_model
from memorised import data, quiet, reciting
from palimpsest.data.records import Record, Roles
from palimpsest.erase.balanced_subnet import BalancedSubnet
from palimpsest.erase.flat import FLAT
from palimpsest.erase.llmu import LLMU
from palimpsest.erase.npo import NPO
from palimpsest.erase.scrub import SCRUB
from palimpsest.erase.selective_amnesia import SelectiveAmnesia
from palimpsest.erase.seuf import SEUF
from palimpsest.erase.uld import ULD
from palimpsest.erase.whp import WHP
from palimpsest.fit.galore import GaLore
from palimpsest.keep.adept import Adept
from palimpsest.train import Training
from palimpsest.write.mom import MixtureOfMemoriesLM
from palimpsest.write.train_lm import Corpus, Size, TrainLM

SHORT = Training(learning_rate=3e-3, epochs=8, batch_size=4, warmup_epochs=0.0)
SMALL = {
    "size": Size(layers=1, width=32, heads=2),
    "corpus": Corpus(length=16),
    "training": Training(learning_rate=1e-2, epochs=6, batch_size=4, warmup_epochs=0.0, micro_tokens=4096),
}
TEXTS = Roles(train=[Record(text=sentence) for sentence in SENTENCES])
TAUGHT = Roles(train=data().retain, general=data().general)

METHODS = {
    "npo": (NPO(training=SHORT), data()),
    "scrub": (SCRUB(training=SHORT), data()),
    "flat": (FLAT(training=SHORT), data()),
    "llmu": (LLMU(training=SHORT), data()),
    "selective-amnesia": (SelectiveAmnesia(layers="all", training=SHORT), data()),
    "uld": (ULD(training=SHORT), data()),
    "adept": (Adept(layers=(1,), refresh=3, training=SHORT), TAUGHT),
    "galore": (GaLore(rank=4, gap=3, training=SHORT), TAUGHT),
    "galore, 8 bits": (GaLore(rank=4, gap=3, state_bits=8, training=SHORT), TAUGHT),
    "train-lm": (TrainLM(**SMALL), TEXTS),
    "mom": (MixtureOfMemoriesLM(**SMALL), TEXTS),
}


class KilledError(Exception):
    """Stands for an end from outside."""


def at(last: int):
    def stop(step: int, model: object) -> bool:
        if step == last:
            raise KilledError
        return False

    return stop


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_method_comes_to_the_same_weights_and_notes(name, tmp_path):
    method, roles = METHODS[name]
    start = reciting() if "forget" in roles else build_model("llama")
    steps: list[int] = []
    run = quiet(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KilledError):
        method.apply(start, roles, run.replace(stop=at(6)))
    resumed = method.apply(start, roles, run.replace(stop=lambda step, _: bool(steps.append(step)), notes={}))
    whole = method.apply(start, roles, quiet())
    assert steps[0] == 6
    assert resumed.digest() == whole.digest()
    assert resumed.ledger.entries[-1].notes == whole.ledger.entries[-1].notes


@pytest.mark.parametrize("name", METHODS)
def test_every_method_asks_the_run_whether_to_stop(name):
    method, roles = METHODS[name]
    steps: list[int] = []
    method.apply(
        reciting() if "forget" in roles else build_model("llama"),
        roles,
        quiet(stop=lambda step, _: steps.append(step) or step == 2),
    )
    assert steps == [1, 2]


def test_the_second_training_of_a_method_does_not_take_up_the_first_ones_place(tmp_path):
    """WHP trains twice on the same records, here with the same settings."""
    calls: list[int] = []

    def late(step: int, model: object) -> bool:
        calls.append(step)
        if len(calls) == 8 + 6:
            raise KilledError
        return False

    method, roles = WHP(alpha=30.0, reinforce=SHORT, training=SHORT), data()
    run = quiet(folder=tmp_path, checkpoint_seconds=0)
    with pytest.raises(KilledError):
        method.apply(reciting(), roles, run.replace(stop=late))
    resumed = method.apply(reciting(), roles, run)
    assert resumed.digest() == method.apply(reciting(), roles, quiet()).digest()


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (SEUF(training=SHORT, attribution_tokens=100), "moe"),
        (BalancedSubnet(training=SHORT), "llama"),
        (NPO(training=dataclasses.replace(SHORT, lora_rank=2)), "llama"),
    ],
    ids=["seuf", "balanced-subnet", "low rank"],
)
def test_a_model_that_was_worked_on_in_place_is_whole_after_an_interruption(method, kind):
    model = build_model(kind)
    names = [name for name, _ in model.network.named_parameters()]
    with pytest.raises(KilledError):
        method.apply(model, data(), quiet(in_place=True, stop=at(2)))
    assert [name for name, _ in model.network.named_parameters()] == names
    assert all(weight.requires_grad for weight in model.network.parameters())
    assert not any(module.training for module in model.network.modules())
