from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from palimpsest.errors import PalimpsestError
from palimpsest.statistics.targets import SparseTargets, ranges, sparse


def made(rows: int = 30, k: int = 6, vocabulary: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, k, generator=generator).softmax(1)
    tokens = torch.randint(0, vocabulary, (rows, k), generator=generator)
    dense = torch.zeros(rows, vocabulary).scatter_add_(1, tokens, weights)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    offsets = torch.tensor([0, 4, 5, 17, rows])
    parts = [sparse(weights[:11], tokens[:11], vocabulary), sparse(weights[11:], tokens[11:], vocabulary)]
    return SparseTargets.joined(parts, labels, offsets, 3), dense, labels


def dense_of(soft, rows, vocabulary=12):
    return torch.zeros(rows, vocabulary).index_put((soft.row, soft.token), soft.share, accumulate=True)


def test_rows_are_the_weights_of_equal_tokens_added_up():
    targets, dense, _ = made()
    assert_close(torch.from_numpy(targets.csr.toarray()), dense, rtol=2e-3, atol=1e-6)
    assert targets.csr.nnz == int((dense > 0).sum())
    assert targets.csr.sum(1) == pytest.approx(1, abs=1e-6)


def test_sequences_are_found_by_their_numbers_in_any_order():
    targets, dense, labels = made()
    places = torch.cat([torch.arange(5, 17), torch.arange(0, 4), torch.arange(5, 17)])
    soft = targets.of(torch.tensor([2, 0, 2]), labels[places])
    assert_close(dense_of(soft, len(places)), dense[places], rtol=2e-3, atol=1e-6)
    assert_close(torch.zeros(len(places)).index_add(0, soft.row, soft.share), torch.ones(len(places)))


def test_what_float16_cannot_hold_is_left_out_and_the_rest_sums_to_one():
    weights = torch.tensor([[1 - 1e-9, 1e-9], [0.7, 0.3]])
    targets = SparseTargets.joined(
        [sparse(weights, torch.tensor([[1, 2], [3, 4]]), 6)], torch.tensor([1, 3]), torch.tensor([0, 2])
    )
    assert targets.tokens.tolist() == [1, 3, 4]
    soft = targets.of(torch.tensor([0]), torch.tensor([1, 3]))
    assert_close(soft.share, torch.tensor([1.0, 0.7, 0.3]), rtol=1e-3, atol=0)
    assert soft.share[1:].sum().item() == pytest.approx(1, abs=1e-7)


def test_how_sharp_they_are():
    targets, dense, _ = made()
    assert_close(targets.likeliest, dense.amax(1), rtol=1e-3, atol=1e-6)
    assert targets.noticeable(0.05).tolist() == (dense >= 0.05).sum(1).tolist()


def test_they_come_back_from_a_file(tmp_path):
    targets, _, labels = made()
    again = SparseTargets.load(targets.save(tmp_path / "targets.safetensors"))
    assert np.array_equal(again.csr.toarray(), targets.csr.toarray())
    assert (again.vocabulary, again.repeated) == (12, 3)
    assert torch.equal(again.of(torch.tensor([1]), labels[4:5]).share, targets.of(torch.tensor([1]), labels[4:5]).share)


def test_intervals_are_listed_with_their_owner():
    owner, members = ranges(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 1, 0]))
    assert owner.tolist() == [0, 0, 0, 2, 2]
    assert members.tolist() == [2, 3, 4, 0, 1]


def test_other_tokens_and_unknown_sequences_are_refused(tmp_path):
    targets, _, labels = made()
    with pytest.raises(PalimpsestError, match="the targets were made for other tokens than those of the batch"):
        targets.of(torch.tensor([0]), (labels[:4] + 1) % 12)
    with pytest.raises(PalimpsestError, match="there are targets for 4 sequences, none for number 4"):
        targets.of(torch.tensor([4]), labels[:4])
    path = targets.save(tmp_path / "targets.safetensors")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PalimpsestError, match="cannot be read as a targets file"):
        SparseTargets.load(path)
