"""Architectures with a peculiarity: scaled embeddings, masks of their own, experts that sum over tokens, no cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from conftest import VOCABULARY_SIZE, build_tokenizer
from memorised import data, people, quiet
from palimpsest.data.encoding import Encoded
from palimpsest.erase.balanced_subnet import BalancedSubnet
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.models.generation import continue_tokens
from palimpsest.models.hooks import capture
from palimpsest.models.model import Model
from palimpsest.statistics.fisher import diagonal_fisher
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.statistics.tracing import _spread, fact_of
from palimpsest.train import Training

SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_STEP = Training(learning_rate=1e-3, epochs=1, max_steps=1, batch_size=6, warmup_epochs=0.0)


def built(network, config, **fields) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(network(config(**fields)).eval(), build_tokenizer())


def gemma3() -> Model:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    return built(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, **SIZES, **kinds)


def gpt_neo(positions: int = 512) -> Model:
    ids = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size")}
    sizes = {"num_layers": 2, "num_heads": 4, "intermediate_size": 64, "window_size": 16, "initializer_range": 0.2}
    return built(
        transformers.GPTNeoForCausalLM,
        transformers.GPTNeoConfig,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=positions,
        **ids,
        **sizes,
    )


def llama4() -> Model:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    inner = {"intermediate_size_mlp": 64}
    return built(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig, **SIZES, **experts, **inner)


def mamba() -> Model:
    ids = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size")}
    return built(transformers.MambaForCausalLM, transformers.MambaConfig, num_hidden_layers=2, state_size=8, **ids)


def test_the_noise_of_tracing_is_that_of_what_the_network_reads():
    model = gemma3()
    facts = [fact_of(model, record) for record in people()[:4]]
    table = model.network.get_input_embeddings()
    found = []
    for fact in facts:
        with torch.no_grad(), capture({"read": table}) as seen:
            model.network(input_ids=torch.tensor([fact.tokens]))
        found.append(seen["read"][0, list(fact.subject)])
    assert _spread(model.network, facts, model.device) == pytest.approx(float(torch.cat(found).std()), rel=1e-4)
    assert float(torch.cat(found).std()) > 3 * float(table.weight.std())


@pytest.mark.parametrize("positions", [512, 64])
def test_a_mask_of_its_own_is_not_packed_over(positions):
    model, rng = gpt_neo(positions), np.random.default_rng(0)
    begun = tuple(rng.integers(5, 40, 30).tolist())
    sequences = [Encoded((*begun, *rng.integers(5, 40, 8).tolist()), 30, i) for i in range(9)]
    apart = torch.cat([sequence_nll(model, [each], quiet()) for each in sequences])
    assert_close(sequence_nll(model, sequences, quiet()), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 1], ids=["all at once", "after a single record"])
def test_experts_that_sum_over_tokens_are_measured_record_by_record(first):
    """A first record by itself cannot show that records meet, and must not settle it."""
    model, records = llama4(), list(people()[:4])
    expected = [diagonal_fisher(model.copy(), [record], quiet()).values for record in records]
    run = quiet()
    if first:
        diagonal_fisher(model, records[:1], run)
    found = diagonal_fisher(model, records, run).values
    for name, value in found.items():
        assert_close(value, torch.stack([each[name] for each in expected]).mean(0), rtol=1e-3, atol=1e-7)
    assert any("one record at a time" in text for text in run.notes["warnings"])


def test_a_network_without_an_inner_part_is_its_own_reference():
    after = GradientAscent(retain="kl", training=ONE_STEP).apply(llama4(), data(), quiet())
    assert after.digest() != llama4().digest()


def test_a_shared_expert_is_switched_off_once():
    before = llama4()
    after = BalancedSubnet(ratio=0.1, training=ONE_STEP).apply(before, data(), quiet())
    assert type(after.network) is type(before.network)
    shared = dict(after.network.named_parameters())["model.layers.0.feed_forward.shared_expert.up_proj.weight"]
    assert float((shared == 0).float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("make", [mamba, gpt_neo])
def test_prompts_with_a_common_beginning_are_continued_as_alone(make):
    model, rng = make(), np.random.default_rng(1)
    begun = rng.integers(5, 40, 10).tolist()
    prompts = [[*begun, *rng.integers(5, 40, n).tolist()] for n in (1, 3, 6)]
    together = continue_tokens(model, prompts, quiet(), 6)
    assert together == [continue_tokens(model, [prompt], quiet(), 6)[0] for prompt in prompts]
