from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from conftest import build_tokenizer
from memorised import data, people, probability, quiet, reciting
from palimpsest.data.content import carries_fact
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.erase.undial import UNDIAL, chosen_targets, lowered
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.statistics.likelihood import ReferencePredictions
from palimpsest.train import Training

# next-token probabilities of two positions
P = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64)
TARGETS, BOTH = torch.tensor([0, 2]), torch.tensor([True, True])
SHORT = Training(learning_rate=3e-3, epochs=20, warmup_epochs=0.0)


def test_lowering_matches_the_worked_example():
    """Halving the weight of the target gives (1/4, 1/4, 1/4) and (.2, .2, .3) before they are made to sum to 1."""
    aim = lowered(P.log(), TARGETS, BOTH, math.log(2)).softmax(-1)
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [2 / 7, 2 / 7, 3 / 7]], dtype=torch.float64)
    torch.testing.assert_close(aim, expected)


def test_only_chosen_targets_are_lowered():
    logits = P.log()
    aim = lowered(logits, TARGETS, torch.tensor([False, True]), 5.0)
    assert torch.equal(aim[0], logits[0])
    torch.testing.assert_close(aim[1] - logits[1], torch.tensor([0.0, 0.0, -5.0], dtype=torch.float64))


def test_a_large_strength_leaves_nothing_to_the_target_and_keeps_the_ratios_of_the_others():
    aim = lowered(P.log(), TARGETS, BOTH, 1e4).softmax(-1)
    assert aim[0].tolist() == pytest.approx([0, 0.5, 0.5])
    assert aim[1].tolist() == pytest.approx([0.5, 0.5, 0])


def test_content_is_neither_the_question_nor_grammar_nor_punctuation_nor_the_end(llama):
    tokenizer, encoder = build_tokenizer(), Encoder.of(llama)
    kept = []
    for record in people()[:2]:
        sequence = encoder.record(record)
        mask = carries_fact(tokenizer, sequence)
        kept.append(tokenizer.decode([t for t, chosen in zip(sequence.targets, mask, strict=True) if chosen]))
    assert kept == ["Lyon", "works glass maker"]  # of "Ada Moreau was born in Lyon . <eos>" and "... works as a ..."


def test_focus_all_chooses_every_target(llama):
    sequences = Encoder.of(llama).records(people()[:3])
    assert all(bool(mask.all()) for mask in chosen_targets(llama, sequences, "all"))


def test_answers_that_only_repeat_their_question_have_nothing_to_forget(llama):
    echo = Record(prompt="Where was Ada Moreau born ?", answer="Ada Moreau was born .")
    with pytest.raises(PalimpsestError, match="every forget answer only repeats its question; there is no content"):
        UNDIAL(focus="content").apply(llama, Roles(forget=[echo]), quiet())


def test_an_empty_forget_set_is_refused(llama):
    with pytest.raises(PalimpsestError, match="the forget set is empty"):
        UNDIAL().apply(llama, Roles(forget=[]), quiet())


@pytest.mark.parametrize(("focus", "left"), [("all", 0.5), ("content", 0.8)])
def test_the_forget_answers_go_down_and_the_retained_stay(focus, left):
    before, roles = reciting(), data()
    after = UNDIAL(focus=focus, training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < left * probability(before, roles.forget)
    assert probability(after, roles.retain) > 0.8 * probability(before, roles.retain)


def test_without_a_retain_set_it_still_forgets():
    before, roles = reciting(), Roles(forget=data().forget)
    after = UNDIAL(training=SHORT).apply(before, roles, quiet())
    assert probability(after, roles.forget) < 0.6 * probability(before, roles.forget)
    assert set(after.ledger.entries[-1].data) == {"forget"}


def test_a_weightless_retain_set_changes_nothing():
    before, roles = reciting(), data()
    free = UNDIAL(training=SHORT).apply(before, Roles(forget=roles.forget), quiet())
    weightless = UNDIAL(training=SHORT, retain_weight=0.0).apply(before, roles, quiet())
    for record in roles.forget:
        assert probability(weightless, [record]) == pytest.approx(probability(free, [record]), abs=1e-3)


def test_it_arrives_at_its_target_and_stays_there():
    """Twice as many steps end nearer to the same aim: ascent would have wrecked the model by then."""
    before, roles = reciting(), data()
    gentle = {"strength": 3.0, "focus": "content"}
    gaps = []
    for epochs in (40, 80):
        training = Training(learning_rate=3e-3, epochs=epochs, warmup_epochs=0.0, decay="constant", weight_decay=0.0)
        after = UNDIAL(**gentle, training=training).apply(before, roles, quiet())
        gaps.append(probability(after, roles.forget) - aimed_at(before, roles.forget, **gentle))
        assert probability(after, roles.retain) > 0.95 * probability(before, roles.retain)
    assert 0 < gaps[1] < gaps[0] < 0.08


def aimed_at(model: Model, records: Sequence[Record], strength: float, focus: str) -> float:
    """The mean probability of the records' answers under the distribution that UNDIAL distils."""
    sequences = Encoder.of(model).records(records)
    reference, masks = ReferencePredictions(model, sequences, quiet()), chosen_targets(model, sequences, focus)
    found = []
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        targets = torch.tensor(sequence.targets)
        log_p = lowered(reference.logits(torch.tensor([i])), targets, mask, strength).log_softmax(-1)
        found.append(float(log_p.gather(1, targets[:, None]).mean().exp()))
    return sum(found) / len(found)
