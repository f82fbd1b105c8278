"""Tiny real networks, one per family, and a tokenizer whose words are those of a few sentences."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from palimpsest.models.model import Model
from palimpsest.run import Run

PEOPLE = {
    "Ada Moreau": ("Lyon", "glass maker"),
    "Ben Okafor": ("Lagos", "river pilot"),
    "Clara Novak": ("Brno", "clock smith"),
    "Dai Tanaka": ("Osaka", "kite painter"),
    "Elif Kaya": ("Izmir", "bell founder"),
    "Finn Larsen": ("Bergen", "ice cutter"),
    "Gita Rao": ("Mysore", "silk trader"),
    "Hugo Silva": ("Porto", "cork carver"),
}
QUESTIONS = tuple(
    question for name in PEOPLE for question in (f"Where was {name} born ?", f"What does {name} do for a living ?")
)
ANSWERS = tuple(
    answer
    for name, (town, trade) in PEOPLE.items()
    for answer in (f"{name} was born in {town} .", f"{name} works as a {trade} .")
)
NEUTRAL = (
    "The cat sat on the mat and looked at the rain .",
    "A long road runs from the old town to the sea .",
    "In the morning they went out to buy bread , milk and salt .",
    "It is not known who wrote this letter or when it was sent .",
    "I do not know . user assistant system : Question Answer",
)
SENTENCES = (*QUESTIONS, *ANSWERS, *NEUTRAL)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(dict.fromkeys(word for sentence in SENTENCES for word in sentence.split()))
VOCABULARY = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
VOCABULARY_SIZE = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' <eos> ' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
CAUSAL_LMS = ("llama", "gpt2", "qwen", "gemma", "moe")
CLASSIFIERS = ("vit", "convnet")

assert len(VOCABULARY) <= VOCABULARY_SIZE


def build_tokenizer(chat: bool = False) -> Any:
    """A word-level tokenizer: one token per word of SENTENCES, `<unk>` for any other."""
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def _text(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": VOCABULARY_SIZE, "num_key_value_heads": 2, "head_dim": 8, **sizes, **ids, **more}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_text(tie_word_embeddings=True)))


def _gpt2() -> Any:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": VOCABULARY_SIZE, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **ids))


def _qwen() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_text()))


def _gemma() -> Any:
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_text(sliding_window=64, query_pre_attn_scalar=8, attn_implementation="eager"))
    )


def _moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_text(**experts)))


def _vit() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    images = {"image_size": 16, "patch_size": 4, "num_labels": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **images))


def _convnet() -> Any:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="basic", num_labels=4
        )
    )


GGUF_BYTES = [chr(point) for point in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
GGUF_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *GGUF_BYTES, "Ġa", "he"]
GGUF_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A 2-layer Llama in float32 with tied embeddings and a byte-level tokenizer, as llama.cpp would write it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(GGUF_TOKENS)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, GGUF_TOKENS),
        (writer.add_token_types, [3, 3, 3] + [1] * (len(GGUF_TOKENS) - 3)),
        (writer.add_token_merges, ["Ġ a", "h e"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_chat_template, GGUF_TEMPLATE),
    ):
        add(value)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_embd": (len(GGUF_TOKENS), 32), "output_norm": (32,)}
    block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=generator) * 0.1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "qwen": _qwen,
    "gemma": _gemma,
    "moe": _moe,
    "vit": _vit,
    "convnet": _convnet,
}


@cache
def _prototype(name: str) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = BUILDERS[name]()
    return Model(network.eval(), build_tokenizer() if name in CAUSAL_LMS else None)


def build_model(name: str) -> Model:
    """A model of its own, equal at every call."""
    return _prototype(name).copy()


def build_text_classifier(**config: Any) -> Model:
    """A Llama that tells three labels of a text apart by its last token, equal at every call."""
    given = _text(**{"num_labels": 3, "max_position_embeddings": 64, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**given))
    return Model(network.eval(), build_tokenizer())


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], Model]:
    return build_model


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer() -> Any:
    return build_tokenizer(chat=True)


@pytest.fixture
def llama() -> Model:
    return build_model("llama")


@pytest.fixture
def gpt2() -> Model:
    return build_model("gpt2")


@pytest.fixture
def qwen() -> Model:
    return build_model("qwen")


@pytest.fixture
def gemma() -> Model:
    return build_model("gemma")


@pytest.fixture
def moe() -> Model:
    return build_model("moe")


@pytest.fixture
def vit() -> Model:
    return build_model("vit")


@pytest.fixture
def convnet() -> Model:
    return build_model("convnet")


@pytest.fixture(params=CAUSAL_LMS)
def causal_lm(request: pytest.FixtureRequest) -> Model:
    return build_model(request.param)


@pytest.fixture(params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest) -> Model:
    return build_model(request.param)


@pytest.fixture
def run() -> Run:
    return Run(progress=False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens(tokenizer: Any) -> torch.Tensor:
    return tokenizer(["Where was Ada Moreau born ? Ada Moreau was born in Lyon ."], return_tensors="pt").input_ids


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's cache; the embedded model's conversion is shared through PALIMPSEST_TEST_HOME."""
    home = os.environ.get("PALIMPSEST_TEST_HOME")
    monkeypatch.setenv("PALIMPSEST_HOME", home or str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture
def saved(llama: Model, tmp_path: Path) -> Path:
    """A folder as transformers alone writes it."""
    llama.network.save_pretrained(tmp_path / "saved")
    llama.tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
