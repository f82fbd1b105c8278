"""The parts of the mixture-of-memories reproduction."""

from __future__ import annotations

import dataclasses

import numpy as np

from memorised import quiet
from palimpsest.reproduce import mom
from palimpsest.reproduce.mom import ARMS, FROZEN, LARGE, MIXTURE, ONE, PAIRS, WIDE, judge, new_model, tried


def test_the_controls_have_what_they_are_named_for():
    def of(name: str) -> tuple[int, int]:
        model = new_model(ARMS[name], 66, 0)
        return model.parameters, sum(block.mixer.value_width for block in model.network.layers)

    touched = ARMS[MIXTURE].settings["top_k"] + 1
    assert of(WIDE)[1] == touched * of(ONE)[1]
    assert abs(of(LARGE)[0] / of(MIXTURE)[0] - 1) < 0.1
    assert new_model(ARMS[FROZEN], 66, 0).network.layers[0].mixer.router.weight.requires_grad is False


def test_an_arm_learns_and_is_measured_on_other_sequences(monkeypatch):
    monkeypatch.setattr(mom, "BATCH", 8)
    monkeypatch.setattr(mom, "TESTED", 16)
    short = dataclasses.replace(mom.TRAINING, batch_size=8)
    found = tried(ARMS[MIXTURE], 4, 0, quiet(), steps=3, training=short)
    assert 0 <= found["recall"] <= 1
    assert 0 < found["entropy"] <= 1
    assert found == tried(ARMS[MIXTURE], 4, 0, quiet(), steps=3, training=short)


def test_the_verdict_follows_from_the_figures():
    names = [f"{name}; {p} pairs" for p in PAIRS for name, arm in ARMS.items() if arm.main or p == PAIRS[1]]
    found = {name: dict.fromkeys(("recall", "parameters", "state", "entropy"), np.array([0.5, 0.5])) for name in names}
    for pairs, recall in zip(PAIRS, (0.6, 0.7, 0.8), strict=True):
        key = f"{MIXTURE}; {pairs} pairs"
        found[key] = found[key] | {"recall": np.array([recall, recall])}
    assert judge(found).verdict == "holds"
    found[f"{FROZEN}; {PAIRS[1]} pairs"] = found[f"{MIXTURE}; {PAIRS[2]} pairs"]
    assert judge(found).verdict == "does not hold"
