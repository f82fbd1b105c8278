"""The parts of the GaLore reproduction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memorised import quiet
from palimpsest.reproduce import galore
from palimpsest.reproduce.galore import (
    ARMS,
    CONTEXT,
    HELD_OUT,
    Arm,
    RandomDirections,
    adamw,
    judge,
    pieces,
    text,
    tried,
)


def test_what_is_measured_is_not_learned():
    learn, held_out = pieces(3)
    whole = text()
    cut = whole[int(0.9 * len(whole)) :]
    assert len(held_out) == HELD_OUT
    assert all(bytes(piece.tokens) in cut for piece in held_out[:5])
    assert all(len(piece.tokens) == CONTEXT for piece in learn[:50])
    assert pieces(3)[0][0].tokens == learn[0].tokens != pieces(4)[0][0].tokens


def test_random_directions_are_orthonormal_and_of_the_right_width():
    weight = torch.nn.Parameter(torch.randn(6, 9))
    optimizer = RandomDirections([{"params": [weight], "rank": 2}])
    weight.grad = torch.randn(6, 9)
    optimizer.step()
    basis = optimizer.state[weight]["basis"]
    assert basis.shape == (2, 6)
    assert torch.allclose(basis @ basis.mT, torch.eye(2), atol=1e-5)


def test_an_arm_learns_and_tells_its_state(monkeypatch):
    monkeypatch.setattr(galore, "STEPS", 8)
    monkeypatch.setattr(galore, "TRAINING", galore.dataclasses.replace(galore.TRAINING, max_steps=8))
    names = ("AdamW", "GaLore, rank 16", "adapters of rank 16", "ReLoRA, rank 16", "W = BA of rank 16")
    found = {name: tried(ARMS[name], 0, quiet()) for name in names}
    assert all(1 < x["loss"] < 5.5 for x in found.values())
    assert found["GaLore, rank 16"]["state"] < found["AdamW"]["state"] == found["ReLoRA, rank 16"]["state"]
    assert tried(Arm(3e-3, adamw), 0, quiet()) == found["AdamW"]


def test_turns_train_all_weights_first_and_then_only_adapters(monkeypatch):
    monkeypatch.setattr(galore, "STEPS", 8)
    seen = []

    def counted(network, training):
        seen.append((training.lora_rank, sum(w.numel() for w in network.parameters() if w.requires_grad)))
        return adamw(network, training)

    tried(Arm(1e-3, counted, adapters=4, turns=4), 0, quiet())
    assert [rank for rank, _ in seen] == [0, 4, 4, 4]
    assert seen[0][1] == galore.new_model(0).parameters > seen[1][1]


def test_a_product_of_full_rank_is_the_same_network():
    whole, product = galore.new_model(0), galore.factorised(galore.new_model(0), 64)
    tokens = torch.randint(0, 256, (2, 9))
    assert torch.allclose(whole(input_ids=tokens).logits, product(input_ids=tokens).logits, atol=1e-4)
    ranks = [torch.linalg.matrix_rank(m[1].weight @ m[0].weight) for m in small_products(galore, 3)]
    assert set(map(int, ranks)) == {3}


def small_products(module, rank):
    """The products that stand for the matrices of the blocks."""
    network = module.factorised(module.new_model(0), rank).network
    return [m for m in network.modules() if isinstance(m, torch.nn.Sequential)]


def test_the_verdict_follows_from_the_figures():
    good = {name: {"loss": np.array([1.6, 1.6]), "state": np.array([50.0, 50.0])} for name in ARMS}
    good["AdamW"] = {"loss": np.array([1.58, 1.57]), "state": np.array([100.0, 100.0])}
    for name in ARMS.keys() - {"AdamW", "GaLore, rank 16", "GaLore, rank 16, 8 bits"}:
        good[name]["loss"] = np.array([2.0, 2.0])
    assert judge(good).verdict == "holds"
    good["adapters of rank 16"]["loss"] = np.array([1.6, 1.6])
    assert judge(good).verdict == "does not hold"
    assert judge(good).rows[1]["state against AdamW's"] == pytest.approx("0.50 ± 0.00")
