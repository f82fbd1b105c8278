from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.errors import PalimpsestError
from palimpsest.statistics import transfer
from palimpsest.statistics.transfer import (
    class_means,
    few,
    neighbour_labels,
    probe_labels,
    ranked_by_similarity,
    split,
)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow(taught, labels, asked, k):
    """One record after the other, every rule written out."""
    unit = [row / max(np.linalg.norm(row), 1e-300) for row in taught.double().numpy()]
    found = []
    for row in asked.double().numpy():
        row = row / max(np.linalg.norm(row), 1e-300)
        distance = [1 - float(row @ other) for other in unit]
        nearest = sorted(range(len(unit)), key=distance.__getitem__)[:k]
        votes = {}
        for i in nearest:
            count, total = votes.get(int(labels[i]), (0, 0.0))
            votes[int(labels[i])] = (count + 1, total + distance[i])
        found.append(min(votes, key=lambda label: (-votes[label][0], votes[label][1], label)))
    return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(6, 40), k=st.integers(1, 6), classes=st.integers(2, 5))
def test_neighbours_vote_as_written_out(seed, n, k, classes):
    taught, asked = drawn(seed, n, 4), drawn(seed + 1, 9, 4)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed)) * 7
    assert neighbour_labels(taught, labels, asked, k).tolist() == slow(taught, labels, asked, k)


def test_the_chunks_do_not_show(monkeypatch):
    taught, asked, labels = drawn(1, 50, 5), drawn(2, 31, 5), torch.arange(50) % 3
    whole = neighbour_labels(taught, labels, asked, 5)
    monkeypatch.setattr(transfer, "CHUNK", 4)
    assert torch.equal(neighbour_labels(taught, labels, asked, 5), whole)


def test_scikit_learn_finds_the_same_neighbours():
    from sklearn.neighbors import KNeighborsClassifier

    taught, asked = drawn(3, 200, 8), drawn(4, 100, 8)
    labels = (taught[:, 0] > 0).long()  # of two classes five votes cannot be even
    theirs = KNeighborsClassifier(5, metric="cosine").fit(taught.numpy(), labels.numpy()).predict(asked.numpy())
    assert neighbour_labels(taught, labels, asked, 5).tolist() == theirs.tolist()


def test_one_neighbour_on_the_teachers_themselves_is_always_right():
    taught, labels = drawn(5, 80, 6), torch.arange(80)
    assert torch.equal(neighbour_labels(taught, labels, taught, 1), labels)


def test_even_votes_go_to_the_nearer_class_then_to_the_smaller():
    taught = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert neighbour_labels(taught, torch.tensor([4, 3]), torch.tensor([[1.0, 0.5]]), 2).tolist() == [4]
    assert neighbour_labels(taught, torch.tensor([4, 3]), torch.tensor([[1.0, 1.0]]), 2).tolist() == [3]


def test_rows_of_zeros_are_no_error():
    taught = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]])
    found = neighbour_labels(taught, torch.tensor([0, 1, 1]), torch.tensor([[0.0, 0.0], [2.0, 0.0]]), 1)
    assert found[1] == 1
    assert found[0] in (0, 1)


def test_too_many_neighbours_and_thin_classes_are_named():
    with pytest.raises(PalimpsestError, match="k is 5, expected 1 to 4"):
        neighbour_labels(drawn(1, 4, 2), torch.arange(4), drawn(2, 4, 2), 5)
    assert few(torch.tensor([0] * 5 + [1] * 4 + [2]), 5) == [1, 2]


def test_the_probe_reads_what_is_linear_whatever_the_scale():
    x = drawn(6, 400, 3) * torch.tensor([1e-4, 1.0, 1e4]) + 50
    labels = (x[:, 0] > 50).long()
    taught, asked = split(400)
    right = probe_labels(x[taught], labels[taught], x[asked]) == labels[asked]
    assert right.float().mean() > 0.9
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    chance = probe_labels(x[taught], shuffled[taught], x[asked]) == shuffled[asked]
    assert chance.float().mean() < 0.7
    with pytest.raises(PalimpsestError, match="two classes"):
        probe_labels(x, torch.zeros(400, dtype=torch.long), x)


def test_the_split_is_that_of_the_official_code():
    taught, asked = split(11)
    theirs = torch.utils.data.random_split(range(11), [8, 3], generator=torch.Generator().manual_seed(2))
    assert [taught.tolist(), asked.tolist()] == [part.indices for part in theirs]


def test_class_means_and_their_order_by_similarity():
    names, means = class_means(torch.tensor([[1.0, 0], [3, 0], [0, 2]]), torch.tensor([9, 9, 4]))
    assert names == [4, 9]
    assert means.tolist() == [[0, 2], [2, 0]]
    known = torch.tensor([[1.0, 0, 0], [0, 5, 0], [0, 0, 0.1]])
    others = torch.tensor([[0.2, 0, 3.0], [0, 1, 1.0]])
    assert ranked_by_similarity(known, others, [10, 20, 30]) == [30, 20, 10]  # .998, .707, .067
    assert ranked_by_similarity(known, others[1:]) == [1, 2, 0]
    with pytest.raises(PalimpsestError, match="width 3 cannot be compared with those of 2"):
        ranked_by_similarity(known, others[:, :2])
