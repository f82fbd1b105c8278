"""Recall tasks: what is scored can be answered from what stood before, and from nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.recall_tasks import GO, RecallTask, copying, multi_query_recall, needle, passkey
from palimpsest.errors import PalimpsestError


def scored(task: RecallTask):
    """Row, position and distance of everything that is scored."""
    rows, positions = task.scored.nonzero(as_tuple=True)
    return zip(rows.tolist(), positions.tolist(), task.distance[task.scored].tolist(), strict=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(0, 9), st.integers(0, 99))
def test_each_scored_value_stood_as_far_back_as_stated_after_the_same_key(pairs, filler, seed):
    task = multi_query_recall(3, pairs, keys=8, values=5, filler=filler, seed=seed)
    assert task.tokens.shape == (3, 4 * pairs + filler)
    assert int(task.tokens.max()) < task.vocabulary
    for row, at, back in scored(task):
        assert task.tokens[row, at] == task.tokens[row, at - back]
        assert task.tokens[row, at - 1] == task.tokens[row, at - back - 1]
    keys = task.tokens[:, 0 : 2 * pairs : 2]
    assert all(len(set(row)) == pairs for row in keys.tolist())


def test_every_pair_is_asked_for_once_or_as_often_as_wanted():
    assert int(multi_query_recall(4, 6).scored.sum()) == 24
    assert int(multi_query_recall(4, 6, queries=2).scored.sum()) == 8


def test_a_copy_repeats_what_was_said_after_its_mark():
    task = copying(5, 7, filler=3, seed=2)
    assert (task.tokens[:, 10] == GO).all()
    assert torch.equal(task.tokens[:, 11:], task.tokens[:, :7])
    assert {back for _, _, back in scored(task)} == {11}


@pytest.mark.parametrize(
    "make", [lambda seed: multi_query_recall(4, 5, seed=seed), lambda seed: copying(4, 6, seed=seed)]
)
def test_the_same_seed_gives_the_same_task_and_another_seed_another(make):
    assert torch.equal(make(3).tokens, make(3).tokens)
    assert not torch.equal(make(3).tokens, make(4).tokens)


class Knows(torch.nn.Module):
    """Predicts every next token of the one task it has, but the last `wrong` of each row."""

    def __init__(self, task: RecallTask, wrong: int = 0) -> None:
        super().__init__()
        self.task, self.wrong = task, wrong
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        known = torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)
        if self.wrong:
            known[:, -1 - self.wrong : -1] = 0
        logits = torch.nn.functional.one_hot(known, self.task.vocabulary).float()
        return dataclasses.make_dataclass("Output", ["logits"])(logits)


def test_hits_are_what_the_network_puts_first():
    task = copying(3, 4)
    assert task.hits(Knows(task)).all()
    assert task.hits(Knows(task, wrong=1)).reshape(3, 4).sum() == 9


def test_recall_by_distance_sorts_what_was_hit():
    task = multi_query_recall(50, 8, seed=1)
    distance = task.distance[task.scored].numpy()
    near = distance < np.median(distance)
    curve = task.by_distance(near, bins=4)
    assert [d for d, _ in curve] == sorted(d for d, _ in curve)
    assert curve[0][1] == 1
    assert curve[-1][1] == 0


def test_the_loss_counts_scored_tokens_only():
    task = multi_query_recall(2, 3, seed=0)
    assert all(s.start == task.first for s in task.sequences())
    size = task.tokens.shape[1] - task.first
    view = dataclasses.make_dataclass("View", ["index", "log_probs", "mean_examples"])
    log_probs = torch.where(task.scored[:, task.first :], -2.0, -100.0)
    found = task.loss(view(torch.tensor([0, 1]), log_probs.flatten(), torch.Tensor.mean))
    assert log_probs.shape == (2, size)
    assert float(found) == pytest.approx(2.0)


@pytest.mark.parametrize("make", [passkey, lambda n, s, seed=0: needle(n, s, needles=4, seed=seed)])
def test_the_answer_stands_once_in_the_text_at_the_stated_depth(make):
    found = make(6, 40, seed=5)
    assert [hidden.depth for hidden in found] == pytest.approx(np.linspace(0, 1, 6))
    for hidden in found:
        assert hidden.record.prompt.count(hidden.record.answer) == 1
        at = hidden.record.prompt.index(hidden.record.answer) / len(hidden.record.prompt)
        assert at == pytest.approx(hidden.depth, abs=0.2)
    assert make(6, 40, seed=5) == found
    assert len({hidden.record.answer for hidden in found}) == 6


def test_a_longer_text_hides_it_among_more_words():
    assert passkey(1, 200)[0].words > 5 * passkey(1, 20)[0].words
    assert "whales" in needle(1, 3, haystack=["Some whales sing."])[0].record.prompt


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: multi_query_recall(1, 40), "pairs is 40 of 32 keys"),
        (lambda: multi_query_recall(1, 4, queries=5), "queries is 5 of 4 pairs"),
        (lambda: copying(1, 0), "length is 0"),
        (lambda: needle(1, 5, needles=11), "needles is 11, expected 1 to 10"),
        (lambda: needle(1, 5, haystack=()), "haystack has no sentence"),
    ],
)
def test_bad_sizes_are_named(make, words):
    with pytest.raises(PalimpsestError, match=words):
        make()
