from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.reproduce import dmm
from palimpsest.reproduce.dmm import (
    COMPUTED,
    DIRECT,
    DO_NOTHING,
    FLOOR,
    GROUPS,
    KNOWN,
    MATCHED,
    OURS,
    OURS_TRAK,
    PARTIAL,
    PLAIN_DIRECT,
    RETAIN,
    SWEEP,
    TURNS,
    judge,
    measure,
    new_network,
    records_of,
)
from palimpsest.statistics.predictions import classify

SWEPT = [f"{name}, {rate:g}, {steps} steps" for rate, steps in SWEEP for name in ("GA", "GA + GD")]
TURNED = [
    title
    for rate, back, away in TURNS
    for title in (f"SCRUB, {rate:g}, {back} and {away} steps", f"GA, then GD, {rate:g}, {away} and {back} steps")
]
ANEW = [f"learned anew, {epochs} of 100 epochs" for epochs in PARTIAL]
STEPPED = [f"GD on retain, {rate:g}, {steps} steps" for rate, steps in RETAIN]
TITLES = (DO_NOTHING, FLOOR, PLAIN_DIRECT, DIRECT, OURS, OURS_TRAK, MATCHED, *SWEPT, *TURNED, *STEPPED, *ANEW)


def cells(*numbers):
    return dict(zip((*GROUPS, dmm.MEAN, COMPUTED), (*numbers, 1.0, 100), strict=True))


GOOD = {
    "rows": {
        **{title: cells(5.0, 3.0, 4.0) for title in TITLES},
        DO_NOTHING: cells(10.0, 1.0, 7.0),
        OURS: cells(1.0, 2.0, 1.0),
    },
    "facts": {"multiplier": 1.1, "difference": 1e-5},
}


def with_row(title, *numbers):
    found = copy.deepcopy(GOOD)
    found["rows"][title] = cells(*numbers)
    return found


def test_a_table_as_in_the_specification_holds():
    found = judge([GOOD, GOOD])
    assert found.verdict == "holds"
    assert [row["model"] for row in found.rows] == list(GOOD["rows"])
    assert found.rows[0][COMPUTED] == "100"
    assert "multiplier 1.10" in found.note


@pytest.mark.parametrize(
    ("one", "failing"),
    [
        (with_row(OURS, 2.1, 2.0, 1.0), [0]),
        (with_row(OURS, 1.0, 2.6, 1.0), [1]),
        (with_row(OURS, 1.0, 2.0, 3.6), [2]),
        (with_row(SWEPT[3], 0.9, 3.0, 4.0), [3]),
        (with_row(SWEPT[5], 1.0, 3.0, 4.0), [3]),
        (with_row(TURNED[0], 0.9, 3.0, 4.0), [3]),
        (with_row(TURNED[1], 5.0, 3.0, 0.9), [4]),
        (with_row(SWEPT[2], 5.0, 3.0, 0.9), [4]),
        (with_row(SWEPT[2], 1.0, 2.0, 1.0), [3, 4, 5]),
        ({**GOOD, "facts": {"multiplier": 1.1, "difference": 0.1}}, [6]),
    ],
)
def test_every_part_of_the_claim_can_fail(one, failing):
    found = judge([one])
    assert [place for place, check in enumerate(found.checks) if check.verdict == "does not hold"] == failing
    assert judge([GOOD, one]).verdict == "inconclusive"


@pytest.mark.parametrize("seed", [0, 1000])
def test_what_is_to_be_forgotten_are_neighbours_in_one_class(seed):
    records, forget = records_of(seed)
    labels = torch.tensor([record.label for record in records])
    assert len(records) == 300
    assert len({int(labels[i]) for i in forget}) == 1
    assert len(set(forget.tolist())) == 15
    assert 17 <= int((labels[:KNOWN] == labels[forget[0]]).sum()) <= 21
    inputs = torch.cat([record.image for record in records]).flatten(1)
    assert inputs.shape == (300, 20)
    spread = inputs[:KNOWN].std(0)
    assert torch.equal(spread.argsort(descending=True), torch.arange(20))  # components, the largest first
    known = inputs[:KNOWN] - inputs[:KNOWN].mean(0)
    correlation = torch.corrcoef(known.T) - torch.eye(20)
    assert float(correlation.abs().max()) < 1e-3


def test_a_perceptron_is_one_of_its_seed_and_comes_back_from_a_copy():
    first, again, other = new_network(1), new_network(1).copy(), new_network(2)
    pixels = torch.randn(3, 1, 1, 20)
    assert first(pixel_values=pixels).logits.shape == (3, 10)
    assert first.digest() == again.digest() != other.digest()
    assert first.parameters == 20 * 16 + 16 + 16 * 10 + 10


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The whole experiment with few networks and few steps: the folder, the outcome, and what it was made from."""
    changes = {
        "TOGETHER": 20,
        "HALVES": 60,
        "TRAK": 2,
        "SWEEP": SWEEP[:1],
        "TURNS": TURNS[:1],
        "RETAIN": RETAIN[:1],
        "PARTIAL": (15,),
        "METHOD": dataclasses.replace(dmm.METHOD, training=dataclasses.replace(dmm.METHOD.training, epochs=20)),
        "LEARNING": dataclasses.replace(dmm.LEARNING, epochs=30),
    }
    made, real = [], dmm.Experiment
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setattr(dmm, name, value)
        patch.setattr(dmm, "Experiment", lambda *given: made.append(real(*given)) or made[0])
        folder = tmp_path_factory.mktemp("dmm")
        yield folder, measure([1000], folder, quiet()), made[0]


def test_the_experiment_computes_every_row_once(small, monkeypatch):
    folder, outcome, _ = small
    assert [row["model"] for row in outcome.rows] == [
        *TITLES[:7],
        *SWEPT[:2],
        *TURNED[:2],
        STEPPED[0],
        "learned anew, 15 of 30 epochs",
    ]
    counts = {row["model"]: int(row[COMPUTED]) for row in outcome.rows}
    assert (counts[DO_NOTHING], counts[OURS], counts[SWEPT[0]]) == (0, 20 * 90, 10 * 15)
    assert counts[TURNED[0]] == counts[TURNED[1]] == 10 * 185 + 5 * 15
    monkeypatch.setattr(dmm, "scores", lambda *given: pytest.fail("it was measured again"))
    assert measure([1000], folder, quiet()) == outcome


def test_the_batch_is_the_method_and_not_one_with_other_settings(small, monkeypatch):
    _, outcome, trial = small
    assert outcome.checks[-1].verdict == "holds"
    batched, _ = trial.matched(trial.direct(trial.datamodel))
    assert trial.difference(0, batched) < 1e-3
    assert trial.difference(1, batched.roll(1, 0)) > 0.1
    monkeypatch.setattr(dmm, "METHOD", dataclasses.replace(dmm.METHOD, multiplier=3.0))
    assert trial.difference(0, batched) > 0.01


def test_scrub_in_a_batch_is_the_method_on_each_network(small):
    _, _, trial = small
    training = dataclasses.replace(dmm.SCRUBBING, learning_rate=3e-3, epochs=4, batch_size=KNOWN)
    method = dmm.SCRUB(forget_epochs=2, training=training)
    batched, computed = trial.scrubbed(method)
    assert computed == 4 * 185 + 2 * 15
    forget, retain = ([trial.records[i] for i in rows] for rows in (trial.forget, trial.retain))
    for number in (0, 3):
        alone = method.apply(trial.before.model(number), Roles(forget=forget, retain=retain), quiet())
        logits = classify(alone, trial.records, quiet()).logits
        assert float((logits - batched[number]).abs().max()) < 0.01
        assert float((logits - trial.outputs[number]).abs().max()) > 0.5
