"""What a memory beside a model adds to each token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import build_model
from memorised import data, quiet, reciting
from palimpsest.audit.member_gains import MemberGains, member_log_probs
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import Interpolate
from palimpsest.models.mixture import mixture
from palimpsest.models.model import Model
from palimpsest.statistics.likelihood import score
from palimpsest.write.knn_lm import KNNLM


def with_memory(weight: float = 0.5) -> Model:
    """A model that knows nothing, beside one that recites people."""
    ignorant = build_model("llama")
    memory = reciting().copy()
    base = Model(ignorant.network, memory.processor, ignorant.ledger)
    return mixture(Interpolate(weight=weight), base=base, memory=memory)


def test_log_probabilities_are_those_of_each_member_alone_and_of_the_whole():
    both, known = with_memory(), data()
    sequences = Encoder.of(both).records(known.forget)
    found = member_log_probs(both, sequences, quiet())
    assert list(found) == ["base", "memory", "mixture"]
    alone = {name: Model(both.network.member(name), both.processor) for name in ("base", "memory")}
    for name, model in {**alone, "mixture": both}.items():
        scores = score(model, sequences, quiet())
        for mine, expected in zip(found[name], scores.split(scores.log_prob), strict=True):
            assert mine == pytest.approx(expected, abs=1e-4)


def test_a_memory_makes_what_it_knows_likelier():
    known = data()
    found = MemberGains(shown=2).measure(with_memory(), Roles(forget=known.forget, train=known.train), quiet())
    assert found["gain/forget"].value > 2
    assert found["likelier/forget"].value > 0.9
    assert found["gain/forget"].n == len(known.forget)
    assert found["gain/train"].low < found["gain/train"].value < found["gain/train"].high
    assert "forget: gained most:" in found.verdict
    assert "train: gained most:" in found.verdict


def test_the_tokens_that_changed_most_are_named(monkeypatch):
    both = with_memory()
    (record,) = [Record(prompt="Where was Ada Moreau born ?", answer="Ada Moreau was born in Lyon .")]
    targets = Encoder.of(both).records([record])[0].targets
    first, mixed = np.full(len(targets), 0.5), np.full(len(targets), 0.5)
    first[3], mixed[3], mixed[5] = 0.01, 0.9, 0.2
    logs = {"base": [np.log(first)], "mixture": [np.log(mixed)]}
    monkeypatch.setattr("palimpsest.audit.member_gains.member_log_probs", lambda *_: logs)
    words = [both.tokenizer.decode([token]).strip() for token in targets]
    verdict = MemberGains(shown=3).measure(both, Roles(forget=[record]), quiet()).verdict
    assert verdict == (f'forget: gained most: "{words[3]}" 0.01 to 0.90; lost most: "{words[5]}" 0.50 to 0.20')
    silent = MemberGains(shown=0).measure(both, Roles(forget=[record]), quiet()).verdict
    assert silent == "forget: gained most: none; lost most: none"


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_member_that_does_not_count_changes_nothing(weight):
    both = with_memory(weight)
    found = member_log_probs(both, Encoder.of(both).records(data().forget), quiet())
    same = "base" if weight == 0 else "memory"
    for mine, whole in zip(found[same], found["mixture"], strict=True):
        assert mine == pytest.approx(whole, abs=1e-5)


def test_a_datastore_that_reads_the_model_s_states_is_compared_too():
    known = data()
    both = KNNLM(k=4, weight=0.5, temperature=1.0).apply(build_model("llama"), Roles(train=known.train), quiet())
    found = MemberGains().measure(both, Roles(train=known.train), quiet())
    assert found["gain/train"].value > 1


def test_a_model_without_members_raises(llama):
    with pytest.raises(PalimpsestError, match="LlamaForCausalLM has none"):
        MemberGains().measure(llama, data(), quiet())
    assert torch.is_grad_enabled()
