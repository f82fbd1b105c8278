"""What holds for every method that compares with the model as given: it is asked once, and no copy of it is kept."""

from __future__ import annotations

import weakref

import pytest

from conftest import build_model
from memorised import data, quiet
from palimpsest.system import create

STEPS = 4


@pytest.fixture
def watched():
    """A model whose forward passes are counted, and how many networks lived during each."""
    model, passes, alive = build_model("llama"), [], weakref.WeakSet()

    def count(module, inputs):
        alive.add(module)
        passes.append((module is model.network, len(alive)))

    model.network.register_forward_pre_hook(count)  # a copy of the network carries the hook along
    return model, passes


@pytest.mark.parametrize("slug", ["npo", "idk-dpo", "kl-minimisation", "llmu", "rmu"])
def test_the_reference_is_computed_before_training_and_costs_no_second_model(slug, watched):
    model, passes = watched
    settings = {"training.epochs": STEPS, "training.warmup_epochs": 0.0, "training.batch_size": 4}
    if slug == "npo":
        settings["retain"] = "kl"
    create(slug, **settings).apply(model, data(), quiet())
    of_given = [given for given, _ in passes]
    first_step = of_given.index(False)
    assert first_step > 0
    assert not any(of_given[first_step:])
    assert max(alive for _, alive in passes) <= 2  # the given one and the one that learns


@pytest.mark.parametrize("slug", ["task-vector", "whp"])
def test_a_model_trained_on_the_way_is_let_go(slug, watched):
    model, passes = watched
    shorter = {"alpha": 5.0} | ({"reinforce.epochs": 1} if slug == "whp" else {})
    create(slug, **{"training.epochs": 1, **shorter}).apply(model, data(), quiet())
    assert max(alive for _, alive in passes) <= 2


@pytest.mark.parametrize("slug", ["npo", "idk-dpo"])
def test_more_epochs_ask_the_reference_no_more(slug, watched):
    model, passes = watched
    asked = []
    for epochs in (1, 4):
        passes.clear()
        create(slug, **{"training.epochs": epochs}).apply(model, data().replace(retain=None), quiet())
        asked.append(sum(given for given, _ in passes))
    assert asked[1] <= asked[0] + 1  # more refusals may be drawn, and take another row
