"""The parts of the curvature reproductions: data with wrong labels and random texts, cuts, and matched comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import build_model
from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.models.anatomy import anatomy
from palimpsest.reproduce import loss_curvature, loss_curvature_text
from palimpsest.reproduce.harness import new_model
from palimpsest.reproduce.loss_curvature import Control, at_matched, matched_curve, new_classifier, noisy_digits
from palimpsest.reproduce.loss_curvature_text import LENGTH, TEXTS, Measures, texts_and_people


def test_a_tenth_of_the_images_has_a_wrong_label():
    data = noisy_digits(3)
    assert len(data.train) == 5 * 1258
    assert len(data.forget) == round(0.1 * len(data.train))
    assert len(data.retain) + len(data.forget) == len(data.train)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(data.forget, data.truth, strict=True))
    assert all(a.label != b.label for a, b in zip(data.forget, data.truth, strict=True))
    assert new_classifier(0).digest() == new_classifier(0).digest() != new_classifier(1).digest()


def test_a_curve_is_read_where_it_crosses_the_matched_share():
    assert at_matched([0.8, 0.4, 0.2], [1.0, 0.9, 0.5], 0.3) == pytest.approx(0.7)
    assert at_matched([0.8, 0.3, 0.2], [1.0, 0.9, 0.5], 0.3) == pytest.approx(0.9)
    assert math.isnan(at_matched([0.8, 0.4], [1.0, 0.9], 0.3))
    points = [
        {"known": np.array([0.8, 0.9]), "clean": np.array([1.0, 1.0])},
        {"known": np.array([0.4, 0.0]), "clean": np.array([0.8, 0.7])},
        {"known": np.array([0.2, 0.0]), "clean": np.array([0.4, 0.2])},
    ]
    found = matched_curve(points, ("clean",), "known", 0.3)["clean"]
    assert found.tolist() == pytest.approx([0.6, 0.8])  # not with the strongest of the cuts that leave nothing


def strength(method):
    for kept in ("rho", "share"):
        if hasattr(method, kept):
            return -getattr(method, kept)
    return getattr(method, "ratio", method.training.learning_rate)


@pytest.mark.parametrize("curves", [loss_curvature.CURVES, loss_curvature_text.CURVES])
def test_sweeps_go_from_the_mildest_cut_to_the_strongest(curves):
    for curve in curves.values():
        assert [strength(method) for method in curve] == sorted({strength(method) for method in curve})


@pytest.mark.parametrize(("kind", "share"), [("svd", 0.25), ("random", 0.5), ("magnitude", 0.3)])
def test_controls_cut_what_they_say(kind, share):
    vit = build_model("vit")
    edited = Control(kind=kind, share=share).apply(vit, Roles(), quiet())
    for part in anatomy(edited.network).select(("mlp_up", "mlp_down")).parts:
        weight, before = part.module.weight.detach(), vit.network.get_parameter(f"{part.name}.weight").detach()
        assert weight.norm() < before.norm()
        if kind == "svd":
            assert torch.linalg.matrix_rank(weight) == round(share * min(weight.shape))
        if kind == "magnitude":
            assert float((weight != 0).float().mean()) == pytest.approx(share, abs=0.01)
            assert torch.equal(weight[weight != 0], before[weight != 0])


def test_texts_are_of_known_words_and_are_measured_apart_from_facts():
    data = texts_and_people(3)
    assert len(data.forget) == TEXTS
    known = new_model().tokenizer.get_vocab()
    assert all(len(r.text.split()) == LENGTH and set(r.text.split()) <= set(known) for r in data.forget)
    assert {r.key for r in data.forget} <= {r.key for r in data.train}
    reading = Measures().measure(new_model(), data, quiet())
    assert reading["recited"].value == 0
    assert reading["distance"].value > 0.8
    assert reading["facts"].n == len(data.retain) // 4
    assert reading["frame"].value < 0.2
