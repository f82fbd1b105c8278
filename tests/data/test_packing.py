from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import ANSWERS, QUESTIONS, build_model
from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.packing import Packed, pack, packer, pad, padding_waste, rows
from palimpsest.data.records import Record
from palimpsest.run import Run
from palimpsest.statistics.likelihood import score

# one a prefix of another, a duplicate, a shared beginning, a loner
SEQUENCES = [
    Encoded((5, 6, 7, 8, 9), 2),
    Encoded((5, 6, 7), 1),
    Encoded((5, 6, 7, 8, 9), 3),
    Encoded((5, 6, 10, 11), 2),
    Encoded((12, 13), 1),
]


def log_probs(network, packed: Packed) -> torch.Tensor:
    logits = packed.target_logits(network)
    return -nn.functional.cross_entropy(logits, packed.targets, reduction="none")


def test_a_packed_row_predicts_what_each_sequence_alone_does(causal_lm):
    network = causal_lm.network
    assert packer(network) is not pad
    with torch.no_grad():
        alone = torch.cat([pad([sequence]).target_logits(network) for sequence in SEQUENCES])
        torch.testing.assert_close(pack(SEQUENCES).target_logits(network), alone, rtol=1e-5, atol=1e-5)


def test_a_packed_row_has_the_gradient_of_the_single_sequences(causal_lm):
    network = causal_lm.network
    weights = list(network.parameters())
    together = torch.autograd.grad(log_probs(network, pack(SEQUENCES)).sum(), weights)
    apart = torch.autograd.grad(sum(log_probs(network, pad([s])).sum() for s in SEQUENCES), weights)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


TOKENS = st.lists(st.integers(0, 3), min_size=2, max_size=8)


@st.composite
def several(draw):
    """Sequences over a tiny alphabet, so that beginnings are shared, repeated and prefixes of each other."""
    drawn = draw(st.lists(TOKENS, min_size=1, max_size=6))
    return [Encoded(tuple(tokens), draw(st.integers(1, len(tokens) - 1))) for tokens in drawn]


@settings(max_examples=40, deadline=None)
@given(several())
def test_any_sequences_have_equal_log_probabilities_packed_and_padded(sequences):
    network = build_model("llama").network
    packed, padded = pack(sequences), pad(sequences)
    assert torch.equal(packed.targets, padded.targets)
    assert torch.equal(packed.owner, padded.owner)
    with torch.no_grad():
        torch.testing.assert_close(log_probs(network, packed), log_probs(network, padded), rtol=1e-4, atol=1e-5)


@given(several())
def test_a_row_has_one_node_for_every_distinct_beginning(sequences):
    beginnings = {s.tokens[: i + 1] for s in sequences for i in range(len(s.tokens))}
    assert pack(sequences).tokens.shape == (1, len(beginnings))


@given(several())
def test_here_is_the_target_itself_and_counts_are_those_of_the_sequences(sequences):
    for packed in (pack(sequences), pad(sequences)):
        assert torch.equal(packed.tokens[packed.row, packed.here], packed.targets)
        assert packed.counts().tolist() == [len(s.targets) for s in sequences]
        assert torch.equal(packed.per_sequence(torch.ones(len(packed.targets))), packed.counts())


@given(several(), st.integers(1, 30))
def test_rows_take_every_sequence_once_within_the_budget(sequences, budget):
    groups = list(rows(sequences, budget))
    assert sorted(i for group in groups for i in group) == list(range(len(sequences)))
    for group in groups:
        assert len(group) == 1 or pack([sequences[i] for i in group]).tokens.shape[1] <= budget


def test_shared_questions_are_computed_once(tokenizer):
    encoder = Encoder(tokenizer, 64)
    candidates = [encoder.pair(QUESTIONS[0], answer) for answer in ANSWERS[:7]]
    assert pack(candidates).tokens.shape[1] < 0.6 * sum(len(s.tokens) for s in candidates)


def test_sequences_longer_than_the_window_of_a_layer_are_scored_exactly(gemma):
    """A mask of ours replaces the window of Gemma's local layers (64 tokens here)."""
    long = [Encoded(tuple(torch.randint(5, 200, (100,)).tolist()), 1, index) for index in range(2)]
    found = score(gemma, long, Run(progress=False))
    with torch.no_grad():
        logits = gemma(input_ids=torch.tensor([s.tokens for s in long])).logits[:, :-1]
    targets = torch.tensor([s.tokens[1:] for s in long])
    expected = logits.log_softmax(-1).gather(-1, targets[..., None]).sum((1, 2))
    torch.testing.assert_close(torch.tensor(found.nll()).float(), -expected, rtol=1e-5, atol=1e-4)


class Recurrent(nn.Module):
    """A causal language model whose mixer is a GRU: it runs along the row and looks at no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=64, get_text_config=lambda: SimpleNamespace(vocab_size=64))
        self.embed, self.mixer, self.head = nn.Embedding(64, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 64)

    def forward(self, input_ids, logits_to_keep=slice(None), **_):
        states, _ = self.mixer(self.embed(input_ids))
        return SimpleNamespace(logits=self.head(states[:, logits_to_keep]))


def test_a_model_that_ignores_masks_gets_padded_rows():
    network = Recurrent()
    arrange = packer(network)
    assert arrange is pad
    with torch.no_grad():
        alone = torch.cat([pad([s]).target_logits(network) for s in SEQUENCES])
        torch.testing.assert_close(arrange(SEQUENCES).target_logits(network), alone)


def test_padding_waste_counts_the_positions_that_hold_nothing():
    assert padding_waste([[SEQUENCES[0], SEQUENCES[4]]]) == pytest.approx(3 / 10)
    records = [Record(prompt=q, answer=a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    encoded = Encoder(build_model("llama").tokenizer, 64).records(records)
    assert padding_waste([[encoded[i] for i in group] for group in rows(encoded, 128)]) <= 0.15
