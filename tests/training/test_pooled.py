"""Schedules in which the sequences of all roles are shuffled together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memorised import data, quiet
from palimpsest.train import Training, schedule, train

ONCE = Training(learning_rate=1e-3, epochs=2, batch_size=5, warmup_epochs=0.0, decay="constant", weight_decay=0.0)


def pooled(model, training=ONCE):
    roles = data()
    return schedule(model, training, quiet(), pooled=True, forget=roles.forget, retain=roles.retain)


def test_every_sequence_of_every_role_comes_once_an_epoch(llama):
    plan = pooled(llama)
    assert plan.steps_per_epoch == 3
    for epoch in (plan.steps[:3], plan.steps[3:]):
        seen = [
            (role, place) for step in epoch for micro in step for role, rows in micro.rows.items() for place in rows
        ]
        assert sorted(seen) == [("forget", i) for i in range(4)] + [("retain", i) for i in range(8)]


def test_a_micro_batch_may_lack_a_role_and_the_step_is_the_same(llama):
    """Token-weighted means of both roles are those of the whole step, however it is cut."""

    def objective(batch):
        loss = torch.zeros(())
        if "forget" in batch:
            loss = loss - batch.forget.cross_entropy
        return loss + 2 * batch.retain.cross_entropy if "retain" in batch else loss

    small = dataclasses.replace(ONCE, micro_tokens=16)
    cut = pooled(llama, small)
    assert any("forget" not in micro.rows for step in cut.steps for micro in step)
    whole = train(llama, pooled(llama), objective, ONCE, quiet())
    parts = train(llama, cut, objective, small, quiet())
    for name, weight in whole.network.state_dict().items():
        torch.testing.assert_close(parts.network.state_dict()[name], weight, rtol=0, atol=2e-5, msg=name)


def test_the_weights_of_a_role_add_up_to_its_token_mean(llama):
    plan = pooled(llama, dataclasses.replace(ONCE, micro_tokens=16))
    for step in plan.steps:
        for role in ("forget", "retain"):
            rows = [(micro, place) for micro in step for place in micro.rows.get(role, ())]
            tokens = sum(len(plan.sequences[role][place].targets) for _, place in rows)
            weight = sum(
                micro.share
                * len(plan.sequences[role][place].targets)
                / (micro.tokens_per_example[role] * len(micro.rows[role]))
                for micro, place in rows
            )
            assert not rows or weight == pytest.approx(1.0), tokens


def test_means_over_records_are_those_of_the_step_however_it_is_cut(llama):
    def objective(batch):
        loss = torch.zeros(())
        for role, weight in (("forget", -1.0), ("retain", 2.0)):
            if role in batch:
                view = getattr(batch, role)
                loss = loss + weight * view.mean_examples(view.mean_nll)
        return loss

    small = dataclasses.replace(ONCE, micro_tokens=16)
    whole = train(llama, pooled(llama), objective, ONCE, quiet())
    parts = train(llama, pooled(llama, small), objective, small, quiet())
    for name, weight in whole.network.state_dict().items():
        torch.testing.assert_close(parts.network.state_dict()[name], weight, rtol=0, atol=2e-5, msg=name)


def test_the_weights_of_a_role_add_up_to_its_mean_over_records(llama):
    plan = pooled(llama, dataclasses.replace(ONCE, micro_tokens=16))
    for step in plan.steps:
        for role in ("forget", "retain"):
            parts = [(micro.share / micro.even[role], len(micro.rows[role])) for micro in step if role in micro.rows]
            count = sum(rows for _, rows in parts)
            assert all(weight == pytest.approx(1 / count) for weight, _ in parts)
