"""Deeper networks that compute the same."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from conftest import CAUSAL_LMS, build_model
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.depth import expand, first_blocks
from palimpsest.models.hooks import capture
from palimpsest.models.loading import load
from palimpsest.models.memory_lm import MemoryForCausalLM, MemoryLMConfig


@pytest.mark.parametrize("architecture", CAUSAL_LMS)
def test_the_deeper_network_computes_the_same_bit_for_bit(architecture, tokens, tmp_path):
    model = build_model(architecture)
    with torch.no_grad():
        before = model(tokens).logits
        asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        said = model.generate(tokens, **asked)
        copied = expand(model.network, [0, 1])
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(model.generate(tokens, **asked), said)  # the cache knows the new places
        again = load(model.save_pretrained(tmp_path / "deeper"))
        assert torch.equal(again(tokens).logits, before)
    assert [name.rpartition(".")[2] for name in copied] == ["1", "3"]
    assert again.network.config.get_text_config().num_hidden_layers == 4


def test_a_copy_stands_after_its_block_and_equals_it_but_for_what_it_gives_out():
    network = build_model("llama").network
    originals = list(network.model.layers)
    assert expand(network, [-1]) == ["model.layers.2"]
    assert list(network.model.layers)[:2] == originals
    block, made = originals[1].state_dict(), network.model.layers[2].state_dict()
    silent = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert all(torch.equal(made[name], block[name]) != (name in silent) for name in block)
    assert not any(made[name].any() for name in silent)
    assert [layer.self_attn.layer_idx for layer in network.model.layers] == [0, 1, 2]


def test_copies_stand_behind_the_chosen_blocks():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=4, **sizes))
    for number, block in enumerate(network.model.layers):
        block.number = number
    assert expand(network, [3, 1]) == ["model.layers.2", "model.layers.5"]
    assert [block.number for block in network.model.layers] == [0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("which", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
def test_blocks_that_differ_in_kind_by_their_number_are_refused(which):
    """Saved, the deeper network could not be loaded again: the config would describe another one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    config = Qwen2MoeConfig(vocab_size=40, num_hidden_layers=3, num_experts_per_tok=2, **sizes, **experts, **which)
    with pytest.raises(PalimpsestError, match="differ in kind by their number"):
        expand(Qwen2MoeForCausalLM(config), [0])


def test_a_list_of_end_marks_is_no_list_of_blocks():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, eos_token_id=[2, 3], **sizes))
    expand(network, [0])
    assert network.config.eos_token_id == [2, 3]


def test_a_block_without_a_known_attention_output_is_refused():
    network = MemoryForCausalLM(MemoryLMConfig(num_hidden_layers=4, hidden_size=16, mixer="gated-delta"))
    with pytest.raises(PalimpsestError, match="0 parts of the role attention_output, expected one"):
        expand(network, [1, 3])


def test_biases_are_silenced_too(tokens):
    model = build_model("gpt2")
    with torch.no_grad():
        for part in anatomy(model.network).find("mlp_down"):
            part.module.bias.fill_(0.3)
        before = model(tokens).logits
        expand(model.network, [1])
        assert torch.equal(model(tokens).logits, before)


def test_no_block_changes_nothing():
    model = build_model("llama")
    before = model.digest()
    assert expand(model.network, []) == []
    assert (model.digest(), model.network.config.num_hidden_layers) == (before, 2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [([0, -2], "named twice"), ([2], "there is no block 2: LlamaForCausalLM has 2"), ([-3], "no block")],
)
def test_blocks_that_are_not_there_are_named(layers, words):
    with pytest.raises(PalimpsestError, match=words):
        expand(build_model("llama").network, layers)


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL_LMS)
def test_the_first_blocks_are_a_model_of_their_own_with_norm_and_head(architecture, tokens, tmp_path):
    model = build_model(architecture)
    short, plan = first_blocks(model, 1), anatomy(model.network)
    with capture({"block": plan.blocks()[0].module}) as outputs:
        model(input_ids=tokens)
    (norm,), head = plan.find("final_norm"), model.network.get_output_embeddings()
    expected = head(norm.module(outputs["block"]))
    cap = getattr(model.network.config, "final_logit_softcapping", None)
    expected = cap * torch.tanh(expected / cap) if cap else expected
    torch.testing.assert_close(short(input_ids=tokens).logits, expected)
    assert len(anatomy(short.network).blocks()) == 1
    assert len(plan.blocks()) == 2
    loaded = load(short.save_pretrained(tmp_path / "short"))
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)


def test_all_blocks_are_the_model_itself():
    llama = build_model("llama")
    whole = first_blocks(llama, 2)
    assert whole.digest() == llama.digest()
    assert whole.network.get_input_embeddings().weight is not llama.network.get_input_embeddings().weight
