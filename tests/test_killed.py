"""A method that was killed goes on from its last checkpoint: the same weights and the same notes as without."""

from __future__ import annotations

import pytest

from conftest import SENTENCES, build_model
from memorised import data, quiet, reciting
from palimpsest.data.records import Record, Roles
from palimpsest.erase.flat import FLAT
from palimpsest.erase.llmu import LLMU
from palimpsest.erase.npo import NPO
from palimpsest.erase.scrub import SCRUB
from palimpsest.erase.selective_amnesia import SelectiveAmnesia
from palimpsest.erase.uld import ULD
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
