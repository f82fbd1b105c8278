"""The memory language model: a transformers model whose cache does not grow, whatever its mixer is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import build_tokenizer
from palimpsest.errors import PalimpsestError
from palimpsest.models.generation import continue_tokens
from palimpsest.models.loading import load
from palimpsest.models.memory_lm import MIXERS, MemoryCache, MemoryForCausalLM, MemoryLMConfig
from palimpsest.models.model import Model
from palimpsest.run import Run

SETTINGS: dict[str, dict[str, Any]] = {"attention": {"window": 5}, "titans": {"window": 4, "chunk": 3}}
every_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))


def build(mixer: str | list[str] = "gated-delta", **more: Any) -> MemoryForCausalLM:
    torch.manual_seed(0)
    settings = SETTINGS.get(mixer) if isinstance(mixer, str) else SETTINGS
    fields = {"hidden_size": 32, "num_attention_heads": 2, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    return MemoryForCausalLM(MemoryLMConfig(**{"mixer": mixer, "mixer_settings": settings, **fields, **more})).eval()


@pytest.fixture
def ids():
    return torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))


@every_mixer
def test_padding_on_either_side_changes_nothing(mixer, ids):
    network = build(mixer)
    alone = network(ids[1:2, :8]).logits
    mask = torch.ones_like(ids)
    left, right = ids.clone(), ids.clone()
    left[1], mask_left = torch.cat([torch.zeros(4, dtype=torch.long), ids[1, :8]]), mask.clone()
    mask_left[1, :4] = 0
    right[1, 8:], mask_right = 0, mask.clone()
    mask_right[1, 8:] = 0
    with torch.no_grad():
        torch.testing.assert_close(network(left, attention_mask=mask_left).logits[1:2, 4:], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(network(right, attention_mask=mask_right).logits[1:2, :8], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            network(left, attention_mask=mask_left).logits[0], network(ids).logits[0], rtol=0, atol=1e-5
        )


@every_mixer
def test_padding_between_tokens_is_as_if_it_were_not_there(mixer, ids):
    network = build(mixer)
    mask = torch.ones_like(ids)
    mask[:, 4:7] = 0
    with torch.no_grad():
        alone = network(torch.cat([ids[:, :4], ids[:, 7:]], 1)).logits
        padded = network(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat([padded[:, :4], padded[:, 7:]], 1), alone, rtol=0, atol=1e-5)


@every_mixer
def test_generation_with_the_cache_is_generation_without(mixer, ids):
    network = build(mixer)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for how in ({}, {"num_beams": 3}):
        asked = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **how}
        assert torch.equal(network.generate(ids, **asked), network.generate(ids, use_cache=False, **asked))


@every_mixer
def test_prompts_with_a_common_beginning_are_answered_as_if_alone(mixer):
    model = Model(build(mixer), build_tokenizer())
    shared = list(range(10, 22))
    prompts = [[*shared, 30], [*shared, 31, 32, 33], [*shared, 34, 35]]
    run = Run(progress=False)
    together = continue_tokens(model, prompts, run, 5)
    assert together == [continue_tokens(model, [prompt], run, 5)[0] for prompt in prompts]


@every_mixer
def test_saved_and_loaded_it_computes_the_same(mixer, ids, tmp_path):
    model = Model(build(mixer), build_tokenizer())
    folder = model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(load(folder)(ids).logits, expected)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected)


@pytest.mark.parametrize("mixer", sorted(set(MIXERS)))
def test_the_cache_has_the_same_size_after_any_number_of_tokens(mixer, ids):
    network = build(mixer)
    short = network(ids[:, :6], use_cache=True).cache.floats
    cache = network(ids, use_cache=True).cache
    assert cache.floats == short
    assert cache.get_seq_length() == 12
    network(ids[:, :1], cache=cache)
    assert (cache.floats, cache.get_seq_length()) == (short, 13)


def test_every_block_can_have_its_own_mixer(ids):
    network = build(
        ["attention", "mom"], mixer_settings={"attention": {"window": 3}, "mom": {"memories": 2, "top_k": 1}}
    )
    assert network.layers[0].mixer.window == 3
    assert network.layers[1].mixer.memories == 2
    assert network(ids).logits.shape == (3, 12, 256)


def test_what_mixers_add_to_the_loss_is_weighed(ids):
    plain, heavy = build("mom"), build("mom", penalty_weight=0.5)
    loss, more = plain(ids, labels=ids).loss, heavy(ids, labels=ids).loss
    added = sum(block.mixer.penalty for block in heavy.layers)
    torch.testing.assert_close(more, loss + 0.5 * added)
    more.backward()
    assert copy.deepcopy(heavy).penalty() == 0


def test_logits_are_computed_only_where_they_are_asked_for(ids):
    network = build()
    whole = network(ids).logits
    torch.testing.assert_close(network(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(network(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])


def test_hidden_states_stand_at_their_tokens_in_padded_rows(ids):
    network = build()
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    states = network(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = network(ids[:, 4:], output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[-1][:, 4:], alone[-1], rtol=0, atol=1e-5)


def test_the_channel_mixer_can_be_left_out(ids):
    assert build(channel="none")(ids).logits.shape == (3, 12, 256)
    assert not any("mlp" in name for name, _ in build(channel="none").named_parameters())


def test_bad_input_is_named(ids):
    network = build()
    with pytest.raises(PalimpsestError, match=r"attention_mask has shape \[3, 1, 12, 12\], expected \[3, tokens\]"):
        network(ids, attention_mask=torch.ones(3, 1, 12, 12))
    with pytest.raises(PalimpsestError, match="cache is a list, expected a MemoryCache"):
        network(ids, cache=[])
    with pytest.raises(PalimpsestError, match="cannot be cut back"):
        MemoryCache().crop(3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixer": "gated_delta"}, "no token mixer 'gated_delta'. Did you mean"),
        ({"mixer": ["mom"]}, "mixer names 1 blocks, but there are 2"),
        ({"channel": "swiglo"}, r"no channel mixer 'swiglo'"),
        ({"mixer_settings": {"windows": 3}}, "mixer gated-delta does not take these settings.*windows"),
    ],
)
def test_a_config_that_means_nothing_is_named(fields, words):
    with pytest.raises(PalimpsestError, match=words):
        build(**fields)


@every_mixer
def test_mixed_precision_computes_nearly_the_same(mixer, ids):
    network = build(mixer).train()
    exact = network(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(ids, labels=ids).loss
    mixed.backward()
    assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)
    assert mixed.item() == pytest.approx(exact.item(), rel=0.01)
