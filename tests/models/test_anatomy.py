from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import ROLES, anatomy
from palimpsest.models.hooks import capture

ATTENTION = ("attention", "attention_query", "attention_key", "attention_value", "attention_output")
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
OTHERS = {
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=64)),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, intermediate_size=64)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, intermediate_size=64)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ),
}
EXPERTS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, intermediate_size=16, num_local_experts=4)
    ),
    "olmoe": lambda: transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**SMALL, intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
        )
    ),
}


def names(network, role):
    return [part.name for part in anatomy(network).find(role)]


def test_every_language_model_has_the_roles_of_one(causal_lm):
    found = anatomy(causal_lm.network)
    assert not found.guessed
    for role in ("embedding", "unembedding", "final_norm"):
        assert len(found.find(role)) == 1, role
    for role in ("block", "mlp", *ATTENTION):
        assert [part.layer for part in found.find(role)] == [0, 1], role
    assert found.find("mlp_up")
    assert found.find("mlp_down")
    assert found.find("classifier_head") == found.find("patch_embedding") == found.find("convolution") == []


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_families_have_them_too(build):
    found = anatomy(build())
    assert not found.guessed
    for role in ("block", *ATTENTION, "mlp_up", "mlp_down"):
        assert [part.layer for part in found.find(role)] == [0, 1], role
    assert len(found.find("final_norm")) == len(found.find("embedding")) == 1


def test_the_parts_of_a_block_are_all_its_linear_layers(llama):
    found = anatomy(llama.network)
    roles = (*ATTENTION[1:], "mlp_up", "mlp_gate", "mlp_down")
    in_roles = {part.name for role in roles for part in found.find(role)}
    linear = {part.name for part in found.find("linear") if part.layer is not None}
    assert in_roles == linear
    assert len(linear) == 14


def test_parts_name_modules_and_parameters_that_exist(make_model):
    for name in ("llama", "gpt2", "qwen", "gemma", "moe", "vit", "convnet"):
        network = make_model(name).network
        everything = dict(network.named_parameters(remove_duplicate=False))
        for role in ROLES:
            for part in anatomy(network).find(role):
                assert network.get_submodule(part.path) is part.module
                assert set(part.tensors()) <= set(everything), (name, role)


def test_gpt2_says_that_query_key_and_value_are_fused(gpt2):
    part = anatomy(gpt2.network).find("attention_query")[1]
    assert part.name == "transformer.h.1.attn.c_attn"
    assert part.fused == ("attention_key", "attention_value")
    report = anatomy(gpt2.network).select("attention_query").report()
    assert "transformer.h.*.attn.c_attn: 2 matches" in report
    assert "attention_key, attention_value" in report
    assert names(gpt2.network, "mlp_up") == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]


def test_phi3_says_that_gate_and_up_are_fused():
    part = anatomy(OTHERS["phi3"]()).find("mlp_gate")[0]
    assert (part.name, part.fused) == ("model.layers.0.mlp.gate_up_proj", ("mlp_up",))


@pytest.mark.parametrize("build", EXPERTS.values(), ids=EXPERTS)
def test_experts_are_slices_of_one_parameter(build):
    network = build()
    found = anatomy(network)
    experts = found.find("expert")
    assert [(part.layer, part.expert) for part in experts] == [(i, e) for i in range(2) for e in range(4)]
    assert experts[0].parameters == ("gate_up_proj", "down_proj")
    down = next(part for part in found.find("mlp_down") if part.expert == 2)
    ((name, tensor),) = down.tensors().items()
    assert name == "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(tensor, network.get_parameter(name)[2])
    assert tensor.data_ptr() == network.get_parameter(name)[2].data_ptr()
    assert [part.parameters for part in found.find("router")] == [("weight",), ("weight",)]
    assert found.select("expert", layers=[1]).report() == (
        "expert = model.layers.*.mlp.experts[expert].gate_up_proj+down_proj: 4 matches"
    )


def test_the_shared_expert_of_qwen2_is_among_the_mlps():
    shared = [p for p in anatomy(EXPERTS["qwen2_moe"]()).find("mlp_up") if p.expert is None]
    assert [part.name for part in shared] == [f"model.layers.{i}.mlp.shared_expert.up_proj" for i in range(2)]


def test_vit_has_patches_and_a_head(vit):
    assert names(vit.network, "patch_embedding") == ["vit.embeddings.patch_embeddings.projection"]
    assert names(vit.network, "classifier_head") == ["classifier"]
    assert names(vit.network, "final_norm") == ["vit.layernorm"]
    assert names(vit.network, "attention_query") == [f"vit.layers.{i}.attention.q_proj" for i in range(2)]
    assert names(vit.network, "embedding") == []


def test_resnet_has_convolutions_blocks_and_a_head(convnet):
    found = anatomy(convnet.network)
    assert [part.name for part in found.blocks()] == [
        "resnet.encoder.stages.0.layers.0",
        "resnet.encoder.stages.0.layers.1",
        "resnet.encoder.stages.1.layers.0",
    ]
    assert len(found.find("convolution")) == sum(isinstance(m, nn.Conv2d) for m in convnet.network.modules())
    assert names(convnet.network, "classifier_head") == ["classifier.1"]
    assert names(convnet.network, "final_norm") == names(convnet.network, "attention") == []


def test_select_takes_patterns_roles_and_layers(llama):
    found = anatomy(llama.network)
    match = found.select(["model.layers.*.mlp.down_proj", "attention_output"])
    assert match.report() == (
        "model.layers.*.mlp.down_proj: 2 matches\nattention_output = model.layers.*.self_attn.o_proj: 2 matches"
    )
    assert list(found.select("mlp_down", layers=[-1]).modules()) == ["model.layers.1.mlp.down_proj"]
    assert list(found.select("*.down_proj", layers=slice(0, 1)).tensors()) == ["model.layers.0.mlp.down_proj.weight"]
    assert len(found.select(["mlp_down", "*.down_proj"]).parts) == 2


def test_selected_modules_can_be_captured(llama, tokens):
    modules = anatomy(llama.network).select("mlp_down").modules()
    with capture(modules) as outputs, torch.no_grad():
        llama(input_ids=tokens)
    assert set(outputs) == set(modules)


@pytest.mark.parametrize(
    ("wanted", "layers", "message"),
    [
        (
            "model.layers.*.ffn",
            None,
            r'^layers "model\.layers\.\*\.ffn" match nothing in LlamaForCausalLM\. '
            r'Close: "model\.layers\.\*\.mlp" \(2 matches\)\.$',
        ),
        ("mlp_dwn", None, r'Close: "mlp_down" \(2 matches\)'),
        ("expert", None, r'layers "expert" match nothing in LlamaForCausalLM'),
        ("zzzz", None, r"Roles: .*attention_query"),
        ("", None, r"match nothing"),
        ([], None, r"the list of patterns is empty"),
        ("mlp", [2], r"layer 2 does not exist: LlamaForCausalLM has layers 0 to 1"),
        ("mlp", [-3], r"layer -3 does not exist"),
        ("mlp", [], r"none in layers \[\]"),
        ("embedding", [0], r'layers "embedding" have 1 match, none in layers \[0\]'),
        (["mlp", "nope.*"], None, r'layers "nope\.\*" match nothing'),
    ],
)
def test_what_selects_nothing_is_an_error(llama, wanted, layers, message):
    with pytest.raises(PalimpsestError, match=message):
        anatomy(llama.network).select(wanted, layers)


def test_an_unknown_role_is_an_error(llama):
    with pytest.raises(PalimpsestError, match=r"no role 'mlp_dwn'.*mlp_down"):
        anatomy(llama.network).find("mlp_dwn")


def test_peft_wrappers_do_not_show(llama, tokens):
    import peft

    bare = {role: [p.name for p in anatomy(llama.network).find(role)] for role in ROLES}
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(llama.network, settings)
    found = anatomy(wrapped)
    assert {role: [p.name for p in found.find(role)] for role in ROLES} == bare
    part = found.find("attention_query")[0]
    assert wrapped.get_submodule(part.path) is part.module
    assert part.parameters == ("base_layer.weight",)
    assert list(part.tensors()) == ["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert not any("lora" in name for block in found.blocks() for name in block.parameters)
    assert found.find("unembedding")[0].parameters == ("modules_to_save.default.weight",)
    with capture({"query": part.module}) as outputs, torch.no_grad():
        wrapped(input_ids=tokens)
    assert outputs["query"].shape == (*tokens.shape, 32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")})
        self.ffn = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.norm = nn.LayerNorm(8)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.stack = nn.ModuleList(Block() for _ in range(3))
        self.last_norm = nn.LayerNorm(8)


def test_an_unknown_network_is_read_by_structure_and_says_so():
    found = anatomy(Unknown())
    assert found.guessed
    assert [part.name for part in found.blocks()] == ["stack.0", "stack.1", "stack.2"]
    match = found.select(["mlp_up", "mlp_down", "attention_query", "attention_output"])
    assert list(match.modules())[::3] == ["stack.0.ffn.0", "stack.0.ffn.2", "stack.0.attn.query", "stack.0.attn.out"]
    assert [part.name for part in found.find("mlp")] == [f"stack.{i}.ffn" for i in range(3)]
    assert [part.name for part in found.find("final_norm")] == ["last_norm"]
    assert "Guessed from the structure of Unknown" in match.report()
    assert "Guessed" not in found.select("stack.*.ffn.0").report()
