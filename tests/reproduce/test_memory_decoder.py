"""The parts of the Memory Decoder reproduction."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from memorised import quiet
from palimpsest.data.encoding import Encoded
from palimpsest.data.records import Record, Roles, check_disjoint
from palimpsest.reproduce import memory_decoder
from palimpsest.reproduce.memory_baselines import Pieces, matched_rank, with_retrieved
from palimpsest.reproduce.memory_decoder import (
    SIZES,
    WIDTH,
    BestEpoch,
    as_many_targets,
    baselines,
    cut,
    docstrings,
    judge,
    new_model,
    one_seed,
    plain,
    reference,
    text,
    tokenizer,
)
from palimpsest.reproduce.runner import find
from palimpsest.statistics.datastore import WEIGHTS
from palimpsest.train import Training, _with_adapters


def figures(**changes):
    """What one seed of a result as in the paper would be."""
    curve = [150.0, 50.0, *[90.0] * (len(WEIGHTS) - 2)]
    found = {"memory": {}, "by weight": {f"{size} + MemDec": curve for size in SIZES}, "seconds": 1.0}
    table = {
        "": (150.0, 100.0, 0.0),
        " DAPT": (60.0, 190.0, 0.0),
        " + kNN-LM": (55.0, 110.0, 0.5),
        " LoRA": (70.0, 150.0, 0.0),
        " + retrieved text": (80.0, 110.0, 0.0),
        " + MemDec, best epoch": (50.0, 120.0, 0.7),
        " + CE-only student, best epoch": (52.0, 120.0, 0.7),
    }
    for size in SIZES:
        for name, numbers in table.items():
            found[size + name] = dict(zip(("domain PPL", "general PPL", "weight"), numbers, strict=True))
        found[f"{size} + MemDec, best epoch"]["memory off"] = 0.0
    for name, numbers in changes.items():
        found[name] |= numbers
    return found


def test_a_table_as_in_the_paper_holds():
    outcome = judge([figures(), figures()])
    assert outcome.verdict == "holds"
    assert outcome.rows[0] == {
        "model": "S",
        "domain PPL": "150.00 ± 0.00",
        "general PPL": "100.00 ± 0.00",
        "weight": "0.00 ± 0.00",
    }


@pytest.mark.parametrize(
    ("name", "numbers", "failing"),
    [
        ("S", {"domain PPL": 40.0}, "S: the memory lowers"),
        ("L", {"domain PPL": 40.0}, "L: the memory lowers"),
        ("S + CE-only student, best epoch", {"domain PPL": 49.0}, "S: not above mixing"),
        ("L + kNN-LM", {"domain PPL": 49.0}, "L: not above kNN-LM"),
        ("S + MemDec, best epoch", {"weight": 0.95}, "S: alpha is below"),
        ("L + MemDec, best epoch", {"memory off": 1e-6}, "L: without the memory"),
        ("L + MemDec, best epoch", {"weight": 0.75}, "the larger model"),
        ("S DAPT", {"general PPL": 110.0}, "S: general perplexity"),
    ],
)
def test_each_part_of_the_claim_can_fail(name, numbers, failing):
    found = judge([figures(**{name: numbers})])
    wrong = [check.expected for check in found.checks if check.verdict != "holds"]
    assert len(wrong) == 1
    assert wrong[0].startswith(failing)
    assert found.verdict == "does not hold"


def test_seeds_that_disagree_decide_nothing():
    worse = figures(**{"S + CE-only student, best epoch": {"domain PPL": 49.0}})
    assert judge([figures(), worse]).verdict == "inconclusive"


def test_what_is_measured_is_not_learned():
    known = text(3)["domain"]
    check_disjoint(known.train, known.test, ("train", "test"))
    check_disjoint(known.train, known.validation, ("train", "validation"))
    check_disjoint(known.validation, known.test, ("validation", "test"))
    assert sum(len(known[role]) for role in ("train", "validation", "test")) <= len(reference())
    check_disjoint(text(3)["general"].train, text(3)["general"].test, ("train", "test"))
    assert text(3)["domain"].test[0] != text(4)["domain"].test[0]


def test_no_paragraph_comes_twice():
    sentences = [s for piece in reference() for s in piece.split(". ") if len(s) > 150]
    assert len(sentences) > 500
    assert len(set(sentences)) > 0.99 * len(sentences)


def test_the_tokenizer_loses_nothing():
    sample = reference()[0][:300] + " ünknown"
    assert tokenizer().decode(tokenizer()(sample)["input_ids"]) == sample
    assert len(tokenizer()) == memory_decoder.VOCABULARY
    assert plain("a  b\n\n   c\n======") == "a b c ==="
    assert sum(map(len, docstrings())) > 10**6


def test_the_weights_of_the_best_epoch_are_kept():
    model = new_model("S", 0)
    watch = BestEpoch(model, text(0)["domain"].validation[:1], 2, quiet())
    student = model.copy()
    for step in range(1, 7):
        with torch.no_grad():  # spoilt after the first look
            student.network.model.norm.weight.mul_(1.0 if step <= 2 else 40.0)
        assert watch.look(step, student) is False
    assert len(watch.nll) == 3
    assert int(np.argmin(watch.nll)) == 0
    assert torch.equal(watch.weights["model.norm.weight"], model.network.model.norm.weight)


def test_adapters_have_at_most_as_many_weights_as_the_memory():
    base, weights = new_model("L", 0), new_model("S", 0).parameters
    rank = matched_rank(base, weights)
    sizes = []
    for r in (rank, rank + 1):
        with _with_adapters(base.copy().network, Training(lora_rank=r)) as adapted:
            sizes.append(sum(w.numel() for name, w in adapted.named_parameters() if "lora" in name))
    assert sizes[0] <= weights < sizes[1]


def test_retrieved_text_stands_before_windows_that_score_every_token_once():
    model, domain = new_model("S", 0), text(0)["domain"]
    pieces = Pieces(tokenizer(), cut(domain.train, WIDTH - 1), WIDTH // 2)
    aided, usual = with_retrieved(model, domain.test[:2], pieces, WIDTH), cut(domain.test[:2])
    assert [t for s in aided for t in s.targets] == [t for s in usual for t in s.targets]
    assert max(len(s.tokens) for s in aided) <= WIDTH
    assert sum(len(s.tokens) > WIDTH // 2 for s in aided) > len(aided) // 2  # most found a piece
    assert sum(len(s.targets) for s in as_many_targets(aided, usual[:2])) <= sum(len(s.targets) for s in usual[:2])


def test_the_nearest_piece_shares_the_words():
    words = ["the yield expression", "a class definition", "floor division of integers"]
    pieces = Pieces(tokenizer(), [Encoded(tuple(tokenizer()(w)["input_ids"]), 1) for w in words], 16)
    assert pieces.nearest(tokenizer()("what does division give?")["input_ids"]) == pieces.tokens[2]
    assert pieces.nearest(tokenizer()("zzz")["input_ids"]) == pieces.nearest(tokenizer()(" ...")["input_ids"]) == ()


def test_a_seed_measures_every_arm(monkeypatch, tmp_path):
    short = Training(learning_rate=1e-3, epochs=1, max_steps=2, batch_size=4, warmup_epochs=0.0, max_length=128)
    for name in ("LEARNING", "DOMAIN"):
        monkeypatch.setattr(memory_decoder, name, short)
    monkeypatch.setattr(memory_decoder, "MEMORY", dataclasses.replace(short, epochs=2, max_steps=None))
    monkeypatch.setattr(memory_decoder, "SIZES", {"S": (16, 1, 1), "L": (24, 1, 1)})
    monkeypatch.setattr(memory_decoder, "K", 4)
    whole = text(0)

    def few(records):
        return [Record(text=record.text[:600]) for record in records[:4]]

    def little(seed):
        return {name: Roles(**{role: few(records) for role, records in roles.items()}) for name, roles in whole.items()}

    monkeypatch.setattr(memory_decoder, "text", little)
    monkeypatch.setattr(memory_decoder, "ADAPTERS", short)
    found = one_seed(0, tmp_path, quiet()) | baselines(0, tmp_path, quiet())
    assert len(found["memory"]["MemDec"]["nll by epoch"]) == 2
    assert found["memory"]["MemDec"]["temperature"] > 0
    assert found["S + MemDec, best epoch"]["memory off"] == found["L + MemDec, best epoch"]["memory off"] == 0.0
    assert {row["model"] for row in judge([found]).rows} >= {
        *("S", "L + kNN-LM", "S + MemDec, last epoch", "L DAPT", "S LoRA", "L + retrieved text")
    }


def test_it_is_listed():
    assert find("memory-decoder").measure is memory_decoder.measure
    assert len(cut(text(0)["domain"].test)) > 50
