"""Merging: the worked example of the rules, and models that are put together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import data, quiet
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.keep.lines import LiNeS, factors, task_vector
from palimpsest.keep.merging import Merge, _Measured, consensus_mask, smallest_kept, ties
from palimpsest.models.loading import load
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

TAU = torch.tensor([[2, -1, 0.5, 0, 0.3], [1, 3, -0.6, 0.2, -0.1], [-4, 0.5, 0.7, -0.1, 0.05]])
LEARN = Finetune(training=Training(learning_rate=5e-3, epochs=10, batch_size=4, warmup_epochs=0.0, weight_decay=0.0))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A start, and two models that learned different people from it; the second one saved."""
    folder = tmp_path_factory.mktemp("family")
    start = load(build_model("llama").save_pretrained(folder / "base"))
    start.ledger = dataclasses.replace(start.ledger, source=str(folder / "base"))
    first = LEARN.apply(start, Roles(train=data().retain[:4]), quiet())
    second = LEARN.apply(start, Roles(train=data().retain[4:]), quiet())
    return start, first, second, str(second.save_pretrained(folder / "second"))


def merged_by_ties(vectors, density):
    """TIES of vectors that are a whole model each."""
    return ties(vectors, torch.tensor([smallest_kept([vector], density) for vector in vectors]))


def weights(model):
    return dict(model.network.named_parameters())


def test_ties_matches_the_worked_example():
    """The largest three of five stay, as in the authors' code at 40 %; the first weight is merged against its sum."""
    torch.testing.assert_close(merged_by_ties(TAU, 0.6), torch.tensor([-4, 1.75, 0.6, 0, 0]))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99])
def test_trimming_keeps_what_the_library_keeps(density):
    from peft.utils.merge_utils import prune

    vector = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    least = smallest_kept(vector.split(300), density)
    assert torch.equal(vector * (vector.abs() >= least), prune(vector, density, method="magnitude"))
    assert smallest_kept([vector], 0.0001) == float("inf")
    assert smallest_kept([torch.tensor([1.0, -2.0]), torch.tensor([[2.0], [0.5]])], 0.25) == 2.0


def test_ties_of_one_whole_task_is_that_task():
    assert torch.equal(ties(TAU[:1]), TAU[0])


def test_the_order_of_tasks_does_not_matter():
    order = torch.tensor([2, 0, 1])
    assert torch.equal(merged_by_ties(TAU, 0.6), merged_by_ties(TAU[order], 0.6))
    total = TAU.sum(0)
    assert torch.equal(consensus_mask(TAU, total, 0.4), consensus_mask(TAU[order], total, 0.4))


def test_the_first_factor_follows_from_how_much_the_rule_took_away():
    for merged, expected in ((merged_by_ties(TAU, 0.6), 4.45 / 6.35 / 3), (TAU.sum(0), 1 / 3)):
        found = _Measured(3)
        for part, of in zip(TAU.split(2, 1), merged.split(2), strict=True):
            found.add(part, of)
        assert found.common_scale == pytest.approx(expected, abs=1e-6)


def test_consensus_matches_the_worked_example():
    tau = torch.tensor([[1, 0, 2, -1], [1, 1, -2, 0], [0, 1, 2, 0.1]])
    total = tau.sum(0)
    assert (total * consensus_mask(tau, total, 0.4)).tolist() == pytest.approx([2, 2, 2, 0])
    assert (total * consensus_mask(tau, total, 1.0)).tolist() == [0, 0, 2, 0]
    assert consensus_mask(tau, total, 0.4, least=0).all()
    assert not consensus_mask(tau, total, 0.4, least=4).any()


@pytest.mark.parametrize("rule", ["arithmetic", "average"])
def test_task_vectors_are_added_to_the_start(family, rule):
    start, first, second, saved = family
    merged = Merge(models=(saved,), rule=rule, scale=0.5).apply(first, Roles(), quiet())
    share = 1.0 if rule == "arithmetic" else 0.5
    for name, weight in weights(merged).items():
        base = weights(start)[name]
        added = (weights(first)[name] - base) + (weights(second)[name] - base)
        torch.testing.assert_close(weight, base + 0.5 * share * added, rtol=0, atol=1e-6)
    notes = merged.ledger.entries[-1].notes
    assert torch.tensor(notes["cosines"]).shape == (2, 2)
    assert 0 < notes["sign_conflicts"] < 1


def test_layer_scaling_of_a_sum_is_the_sum_of_scaled_ones(family):
    start, first, second, saved = family
    merged = Merge(models=(saved,), scale=0.5, layer_scaling=True).apply(first, Roles(), quiet())
    by = factors(start.network, 0.5, 0.5)  # alpha of a plain sum of two is 1/2
    vectors = [task_vector(start.network, m.network) for m in (first, second)]
    for name, weight in weights(merged).items():
        expected = weights(start)[name] + by[name] * (vectors[0][name] + vectors[1][name])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert merged.ledger.entries[-1].notes["alpha"] == pytest.approx(0.5)


def test_ties_and_consensus_work_on_the_whole_model_at_once(family):
    start, first, second, saved = family
    vectors = [task_vector(start.network, m.network) for m in (first, second)]
    flat = torch.stack([torch.cat([v.flatten() for v in vector.values()]) for vector in vectors])
    for rule in ("ties", "consensus"):
        merged = Merge(models=(saved,), rule=rule, scale=1.0).apply(first, Roles(), quiet())
        added = torch.cat([v.flatten() for v in task_vector(start.network, merged.network).values()])
        total = flat.sum(0)
        expected = merged_by_ties(flat, 0.2) if rule == "ties" else total * consensus_mask(flat, total, 0.4)
        torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)


def test_one_model_is_interpolated(family):
    _, first, _, _ = family
    alone = Merge(scale=0.3).apply(first, Roles(), quiet())
    assert alone.ledger.entries[-1].method == "task-arithmetic"
    interpolated = LiNeS(alpha=0.3, schedule="uniform").apply(first, Roles(), quiet())
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weight, weights(interpolated)[name], rtol=0, atol=1e-7)


def test_models_that_cannot_be_merged_are_refused(family, tmp_path):
    _, first, _, _ = family
    with pytest.raises(PalimpsestError, match="at least two models"):
        Merge(rule="consensus").apply(first, Roles(), quiet())
    other = str(build_model("gpt2").save_pretrained(tmp_path / "gpt2"))
    with pytest.raises(PalimpsestError, match="different architectures"):
        Merge(models=(other,)).apply(first, Roles(), quiet())
    for density in (0.0, 1.5):
        with pytest.raises(PalimpsestError, match="density"):
            Merge(density=density)


def test_the_same_model_twice_is_said(family):
    _, _, second, saved = family
    notes = Merge(models=(saved,)).apply(second, Roles(), quiet()).ledger.entries[-1].notes
    assert any("is the base their common start?" in text for text in notes["warnings"])
