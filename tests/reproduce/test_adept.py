"""The parts of the ADEPT reproduction."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.models.loading import load
from palimpsest.reproduce import adept, domains
from palimpsest.reproduce.adept import ADEPT, ALL, ARMS, EVEN, LEAST, MOST, RATES, best_rates, judge
from palimpsest.reproduce.domains import at_equal_domain_loss, domain_roles, reader

pytestmark = pytest.mark.usefixtures("texts")


def test_what_is_measured_is_neither_learned_nor_probed_nor_read():
    data = domain_roles(3, 20, 10, 8)
    assert [len(data[role]) for role in ("train", "domain", "general", "read", "kept")] == [20, 10, 8, 22, 10]
    assert not {r.text for r in data.read} & {r.text for r in (*data.general, *data.kept)}
    assert not {r.text for r in data.train} & {r.text for r in data.domain}
    assert not {r.text for r in data.general} & {r.text for r in data.kept}
    assert all("#### " in record.text for record in data.train)
    assert all("Title" not in record.text for record in data.kept)
    assert domain_roles(3, 20, 10, 8).digest() == data.digest() != domain_roles(4, 20, 10, 8).digest()


def test_the_reader_has_read_and_is_trained_once(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "load", lambda run: load(saved, run=run))
    data = domain_roles(3, 20, 10, 8)
    path = reader(3, data, tmp_path, quiet())
    entry = load(path).ledger.entries[-1]
    assert (entry.method, entry.data) == ("finetune", Roles(train=data.read).digest())
    monkeypatch.setattr(domains, "load", None)
    assert reader(3, data, tmp_path, quiet()) == path


def test_curves_are_compared_where_the_domain_is_learned_equally_well():
    curve = np.array([[3.0, 2.0], [2.0, 2.5], [1.0, 3.5]])
    assert at_equal_domain_loss(curve, 1.5) == pytest.approx(3.0)
    assert np.isnan(at_equal_domain_loss(curve, 0.5))


def test_each_way_to_train_takes_the_rate_with_the_lowest_sum_of_both_losses(tmp_path, monkeypatch):
    def tried(method, seed, folder, run, steps):
        rate = method.training.learning_rate
        assert seed == adept.RATE_SEED
        return {"curve": [[3.0, 2.0], [2.0, 2.0 + abs(rate - 3e-4) * 100]]}

    monkeypatch.setattr(adept, "tried", tried)
    assert best_rates(tmp_path, quiet()) == dict.fromkeys(RATES, 3e-4) | {"all weights": 1e-4}


def test_the_arms_are_what_they_are_named_for():
    made = {name: arm.method(1e-4) for name, arm in ARMS.items()}
    assert (made[EVEN].choice, made[LEAST].choice, made[MOST].choice) == ("uniform", "least", "most")
    assert (made[LEAST].unit_rates, made[ADEPT].unit_rates) == (False, True)
    assert {method.training.learning_rate for method in made.values()} == {1e-4}


def test_the_verdict_follows_from_the_curves():
    kept = dict.fromkeys(ARMS, 2.5) | {ALL: 2.6, EVEN: 2.4, LEAST: 2.2, ADEPT: 2.1}
    curves = {name: [np.array([[3.0, 2.0], [1.5, end]])] * 2 for name, end in kept.items()}
    notes = {"seconds": 1.0, "notes": {"layer_importance": [5.0, 0.1, 0.1, 0.2]}}
    found = {name: [notes, notes] for name in curves}
    rates = dict.fromkeys(RATES, 3e-4)
    assert judge(curves, found, rates).verdict == "holds"
    assert json.dumps(dataclasses.asdict(judge(curves, found, rates)))
    curves[ALL], curves[MOST] = curves[MOST], [np.array([[3.0, 2.0], [1.5, 2.1]])] * 2
    assert judge(curves, found, rates).verdict == "does not hold"
