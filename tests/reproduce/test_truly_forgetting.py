from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import build_model
from memorised import quiet
from palimpsest.audit.reading import Reading, Value
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.report.evidence import ModelEvidence
from palimpsest.reproduce import truly_forgetting
from palimpsest.reproduce.truly_forgetting import (
    ASCENT,
    BEFORE,
    FORGOTTEN,
    GOLD,
    HEAD_ONLY,
    NAMES,
    STEPS,
    THIRD,
    Ascent,
    HeadMask,
    PseudoLabels,
    judge,
    measure,
    roles,
    sgd,
)
from palimpsest.statistics.predictions import classify
from palimpsest.train import Training
from pictured import accuracy, pictures, recognising

NEIGHBOURS = "knn/downstream_forget_like"
OF_BEFORE = {"cka_before/forget": 1.0, "cka_gold/forget": 0.5, NEIGHBOURS: 0.8}
GOOD = {
    **{name: {"agl": 0.9, "verdict": "in between"} for name in NAMES},
    BEFORE: {**OF_BEFORE, "agl": 0.0, "cka_gold/retain": 0.9, "verdict": "unchanged"},
    GOLD: {"agl": 1.0, NEIGHBOURS: 0.6, "verdict": "close to retrained"},
    THIRD: {"agl": 0.99, "verdict": "close to retrained"},
    **{name: {**OF_BEFORE, "agl": 0.99, "verdict": "classifier-only"} for name in HEAD_ONLY},
    ASCENT: {"agl": 0.1, "cka_gold/retain": 0.6, "verdict": "in between"},
}
CEILING = {"cka_ceiling/forget": 0.7, "cka_ceiling/retain": 0.92}


def evidence(table):
    found = []
    for seed in (0, 1):
        for name, numbers in table.items():
            given = {k: v for k, v in numbers.items() if k != "verdict"} | CEILING
            values = tuple(Value(name=k, value=v, n=9) for k, v in given.items())
            reading = Reading(probe="truly-forgetting", values=values, verdict=f"{numbers['verdict']}: as it is")
            found.append(ModelEvidence(name=name, part="erased", title=name, seed=seed, readings=(reading,)))
    return found


def test_a_table_as_in_the_specification_holds():
    found = judge(evidence(GOOD))
    assert found.verdict == "holds"
    assert [row["model"] for row in found.rows] == list(NAMES)
    assert found.rows[0]["verdict"] == "unchanged"
    assert len(found.checks) == 7 * len(HEAD_ONLY) + 2


@pytest.mark.parametrize(
    ("name", "changes", "failing"),
    [
        ("bias mask", {"agl": 0.975}, ["the logits pass"]),
        ("bias mask", {"agl": 0.9}, ["the logits pass", "as those of a third"]),
        ("bias mask", {"cka_before/forget": 0.99}, ["the features are those of before"]),
        ("bias mask", {NEIGHBOURS: 0.81}, ["so are the answers of neighbours"]),
        ("bias mask", {NEIGHBOURS: 0.6}, ["so are the answers of neighbours", "gold's neighbours know less"]),
        ("bias mask", {"cka_gold/forget": 0.65}, ["at least 0.1 below that of two retrained"]),
        ("head relabelled", {"verdict": "in between"}, ['called "classifier-only"']),
        (THIRD, {"verdict": "in between"}, ["the third retrained model is called"]),
        (ASCENT, {"cka_gold/retain": 0.91}, ["gradient ascent ruins features"]),
    ],
)
def test_every_part_of_the_claim_can_fail(name, changes, failing):
    found = judge(evidence({**GOOD, name: GOOD[name] | changes}))
    wrong = [check.expected for check in found.checks if check.verdict == "does not hold"]
    assert len(wrong) == len(failing)
    assert all(part in expected for part, expected in zip(failing, wrong, strict=True))
    assert found.verdict == "does not hold"


def test_a_number_that_is_missing_decides_nothing():
    found = judge(evidence({**GOOD, ASCENT: GOOD[ASCENT] | {"cka_gold/retain": float("nan")}}))
    assert found.verdict == "inconclusive"


def test_downstream_sets_are_the_digits_mirrored_apart_by_what_is_forgotten():
    made, again, other = roles(3), roles(3), roles(4)
    like, unlike = made.downstream_forget_like, made.downstream_retain_like
    assert {record.label for record in like} == set(FORGOTTEN) == {record.label for record in made.forget}
    assert not {record.label for record in unlike} & set(FORGOTTEN)
    assert len(like) + len(unlike) == 1797
    pairs = [(a, b) for a, b in zip([r for r in made.train if r.label in FORGOTTEN], like, strict=False)]
    noise = np.stack([b.image - a.image[..., ::-1] for a, b in pairs])
    assert noise.std() == pytest.approx(0.25, abs=0.01)
    assert abs(noise.mean()) < 0.01
    assert made.digest() == again.digest() != other.digest()


def test_a_masked_head_never_says_a_forgotten_label():
    model = recognising()
    masked = HeadMask().apply(model, pictures(), quiet())
    logits, before = (classify(m, pictures().train, quiet()).logits for m in (masked, model))
    assert not (logits.argmax(-1) == 3).any()
    assert torch.equal(logits[:, :3], before[:, :3])
    assert accuracy(model, pictures().forget) == 1


@pytest.mark.parametrize("part", ["head", "all"])
def test_relabelling_teaches_the_best_other_label(part):
    model = recognising()
    training = Training(learning_rate=2e-2, epochs=30, batch_size=32, weight_decay=0.0, warmup_epochs=0.0)
    taught = PseudoLabels(part=part, training=training).apply(model, pictures(), quiet())
    before = classify(model, pictures().forget, quiet()).logits[:, :3].argmax(-1)
    assert torch.equal(classify(taught, pictures().forget, quiet()).logits.argmax(-1), before)
    assert accuracy(taught, pictures().retain) == 1
    head = set(anatomy(model.network).select("classifier_head").tensors())
    changed = {
        name
        for (name, old), new in zip(
            model.network.state_dict().items(), taught.network.state_dict().values(), strict=True
        )
        if not torch.equal(old, new)
    }
    assert changed == head if part == "head" else changed > head


def test_ascent_takes_the_steps_of_the_official_optimizer():
    """Written out on a network without batch normalisation: momentum 0.9, weight decay, no clipping."""
    model, forget = build_model("vit"), pictures().forget
    short = Training(**{**vars(STEPS), "max_steps": 2, "batch_size": len(forget)})
    climbed = Ascent(training=short).apply(model, pictures(), quiet())
    by_hand = model.copy().network.train()
    weights = list(by_hand.parameters())
    speed = [torch.zeros_like(weight) for weight in weights]
    inputs, labels = torch.stack([r.image for r in forget]), torch.tensor([r.label for r in forget])
    for _ in range(2):
        loss = -torch.nn.functional.cross_entropy(by_hand(pixel_values=inputs).logits, labels)
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        with torch.no_grad():
            for i, (weight, slope) in enumerate(zip(weights, slopes, strict=True)):
                if slope is not None:
                    speed[i] = 0.9 * speed[i] + slope + 5e-4 * weight
                    weight -= short.learning_rate * speed[i]
    for own, expected in zip(climbed.network.parameters(), weights, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5)
    assert isinstance(sgd(model.network, short), torch.optim.SGD)


def test_a_seed_that_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    def tiny(seed, data, run):
        model = recognising()
        return dict.fromkeys(NAMES, model) | {GOLD: build_model("convnet")}

    monkeypatch.setattr(truly_forgetting, "subjects", tiny)
    monkeypatch.setattr(truly_forgetting, "roles", lambda seed: pictures())
    with monkeypatch.context() as patched:
        patched.setattr(truly_forgetting, "judge", lambda models: models)
        found = measure([5], tmp_path, quiet())
        assert [model.name for model in found] == list(NAMES)
        patched.setattr(truly_forgetting, "subjects", None)
        again = measure([5], tmp_path, quiet())
    assert [m.readings[0].values for m in again] == [m.readings[0].values for m in found]


def test_a_probe_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(truly_forgetting, "subjects", lambda *_: dict.fromkeys(NAMES, recognising()))
    monkeypatch.setattr(truly_forgetting, "roles", lambda seed: pictures().replace(forget=pictures().forget[:3]))
    with pytest.raises(PalimpsestError, match="seed 5 could not be measured: the forget set has 3 records"):
        measure([5], tmp_path, quiet())
