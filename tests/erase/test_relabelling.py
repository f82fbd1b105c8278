from __future__ import annotations

import dataclasses

import pytest
import torch

from memorised import quiet
from palimpsest.data.labelled import labelled
from palimpsest.erase import relabelling
from palimpsest.erase.relabelling import Amnesiac, BadTeacher, relabelled
from palimpsest.errors import PalimpsestError
from palimpsest.models.untrained import untrained
from palimpsest.statistics.predictions import classify
from palimpsest.train import Training
from pictured import accuracy, pictures, recognising

SHORT = Training(learning_rate=3e-3, epochs=10, batch_size=16, weight_decay=0.0, warmup_epochs=0.0)


def test_new_labels_are_uniform_over_the_others(convnet):
    one = labelled(convnet, pictures().train)[9]  # label 1 of four
    many = relabelled([one] * 3000, 4, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([example.label for example in many]), minlength=4).tolist()
    assert counts[1] == 0
    assert all(900 < counts[other] < 1100 for other in (0, 2, 3))
    assert all(example.inputs is one.inputs for example in many)


def test_of_two_labels_the_other_one_is_taken(convnet):
    examples = labelled(convnet, pictures().train[:16])
    found = relabelled(examples, 2, torch.Generator())
    assert [example.label for example in found] == [1 - example.label for example in examples]


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_amnesiac_forgets_and_keeps(kind):
    before, roles = recognising(kind), pictures()
    after = Amnesiac(training=SHORT).apply(before, roles, quiet())
    assert accuracy(before, roles.forget) == 1
    assert accuracy(after, roles.forget) <= 0.25
    assert accuracy(after, roles.retain) == 1


def test_amnesiac_trains_on_all_of_both_sets_once_an_epoch(convnet, monkeypatch):
    seen = []

    def recorded(model, plan, objective, training, run):
        seen.append(plan)
        return model.copy()

    monkeypatch.setattr(relabelling, "train", recorded)
    roles = pictures()
    Amnesiac().apply(convnet, roles, quiet())
    (plan,) = seen
    mixed = plan.sequences["mixed"]
    labels = [example.label for example in mixed]
    assert labels[len(roles.forget) :] == [record.label for record in roles.retain]
    assert 3 not in labels[: len(roles.forget)]
    rows = [i for step in plan.steps for micro in step for i in micro.rows["mixed"]]
    assert sorted(rows) == sorted([*range(len(mixed))] * Amnesiac().training.epochs)


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_bad_teaching_draws_the_forget_set_to_a_random_network(kind):
    before, roles = recognising(kind), pictures()
    after = BadTeacher(retain_share=1.0, training=SHORT).apply(before, roles, quiet())
    taught = classify(untrained(before, quiet()), roles.forget, quiet()).probabilities

    def distance(model) -> float:
        return float((classify(model, roles.forget, quiet()).probabilities - taught).abs().sum(-1).mean())

    assert distance(after) < 0.5 * distance(before)
    assert accuracy(after, roles.retain) >= 0.9


def first_loss(method: BadTeacher, model, monkeypatch) -> float:
    """What bad teaching minimises in its first and only step."""
    seen, real = [], relabelling.train

    def recorded(model, plan, objective, training, run):
        return real(model, plan, lambda batch: seen.append(objective(batch)) or seen[-1], training, run)

    monkeypatch.setattr(relabelling, "train", recorded)
    method.apply(model, pictures(), quiet())
    return float(seen[0].detach())


ONE_STEP = dataclasses.replace(SHORT, epochs=1, batch_size=64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_divergence_from_both_teachers(temperature, monkeypatch):
    model, roles = recognising("vit"), pictures()
    method = BadTeacher(retain_share=1.0, temperature=temperature, training=ONE_STEP)
    forget, bad = (classify(m, roles.forget, quiet()).logits for m in (model, untrained(model, quiet())))
    p, q = ((z / temperature).log_softmax(-1) for z in (bad, forget))
    expected = (p.exp() * (p - q)).sum() / (len(roles.forget) + len(roles.retain))  # nothing is lost on retain yet
    assert first_loss(method, model, monkeypatch) == pytest.approx(float(expected), rel=1e-4)


def test_where_both_teachers_agree_with_the_model_nothing_is_to_be_learned(monkeypatch):
    monkeypatch.setattr(relabelling, "untrained", lambda model, run: model)
    assert first_loss(BadTeacher(training=ONE_STEP), recognising("vit"), monkeypatch) == pytest.approx(0, abs=1e-6)


def test_a_share_of_the_retain_set_is_taken_at_random(convnet, monkeypatch):
    taken = {}

    def recorded(model, plan, objective, training, run):
        taken[run.seed] = [example.content for example in plan.sequences["mixed"]]
        return model.copy()

    monkeypatch.setattr(relabelling, "train", recorded)
    for seed in (0, 1):
        BadTeacher(retain_share=0.5).apply(convnet, pictures(), quiet(seed=seed))
    assert {len(examples) for examples in taken.values()} == {8 + 12}
    assert taken[0][:8] == taken[1][:8]
    assert set(taken[0][8:]) != set(taken[1][8:])


def test_they_take_classifiers_only(llama):
    for method in (Amnesiac(), BadTeacher()):
        with pytest.raises(PalimpsestError, match="takes a classifier, but LlamaForCausalLM is a causal-lm"):
            method.apply(llama, pictures(), quiet())
