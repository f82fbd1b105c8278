from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.errors import PalimpsestError
from palimpsest.ledger import FILE, Entry, Ledger
from palimpsest.models.loading import load
from palimpsest.models.model import Model

ENTRY = Entry(
    method="npo",
    settings={"beta": 0.1},
    seed=1,
    version="0",
    data={"forget": "f"},
    weights_before="a",
    weights_after="b",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_and_loading_gives_equal_outputs_and_history(causal_lm, tokens, tmp_path, run):
    causal_lm.ledger = Ledger(source="tests").add(ENTRY)
    loaded = load(causal_lm.save_pretrained(tmp_path / "deep" / "model"), run=run)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, causal_lm(input_ids=tokens).logits)
    assert loaded.ledger == causal_lm.ledger
    assert loaded.digest() == causal_lm.digest()
    assert loaded.tokenizer.get_vocab() == causal_lm.tokenizer.get_vocab()


def test_classifiers_come_back_equal(classifier, images, tmp_path, run):
    loaded = load(classifier.save_pretrained(tmp_path / "model"), run=run)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=images).logits, classifier(pixel_values=images).logits)


def test_the_ledger_beside_the_weights_holds_no_data(llama, tmp_path):
    llama.ledger = llama.ledger.add(ENTRY)
    saved = json.loads((llama.save_pretrained(tmp_path / "m") / FILE).read_text())
    assert saved["entries"][0]["data"] == {"forget": "f"}


def test_a_folder_with_files_is_refused_and_left_alone(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PalimpsestError, match="already holds files"):
        llama.save_pretrained(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(llama, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(PalimpsestError, match="is a file, expected a folder"):
        llama.save_pretrained(tmp_path / "model")


def test_overwriting_replaces_everything(llama, gpt2, tmp_path, run):
    folder = llama.save_pretrained(tmp_path / "model")
    gpt2.save_pretrained(folder, overwrite=True)
    assert type(load(folder, run=run).network).__name__ == "GPT2LMHeadModel"
    assert os.listdir(tmp_path) == ["model"]


def test_files_that_are_no_model_are_not_overwritten(llama, tmp_path):
    (tmp_path / "people.jsonl").write_text("mine")
    with pytest.raises(PalimpsestError, match="holds files, but no model: they are not overwritten"):
        llama.save_pretrained(tmp_path, overwrite=True)
    assert contents(tmp_path) == {"people.jsonl": b"mine"}


def test_a_link_to_a_folder_stays_a_link(llama, gpt2, tmp_path, run):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    assert llama.save_pretrained(tmp_path / "model") == tmp_path / "model"
    gpt2.save_pretrained(tmp_path / "model", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["disk", "model"]
    assert (tmp_path / "model").is_symlink()
    assert type(load(tmp_path / "disk", run=run).network).__name__ == "GPT2LMHeadModel"


def test_the_folder_one_is_in_may_be_saved_into(llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    llama.save_pretrained(".")
    assert (tmp_path / "here" / FILE).exists()


def test_an_empty_folder_may_be_saved_into(llama, tmp_path):
    (tmp_path / "model").mkdir()
    assert (llama.save_pretrained(tmp_path / "model") / FILE).exists()


def test_an_interrupted_swap_puts_the_old_model_back(llama, gpt2, tmp_path, monkeypatch):
    folder = llama.save_pretrained(tmp_path / "model")
    before, replace = contents(folder), os.replace

    def failing(source, target):
        if Path(target) == folder and "-old-" not in str(source):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(PalimpsestError, match="what was there is intact"):
        gpt2.save_pretrained(folder, overwrite=True)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["model"]


@contextmanager
def file_size_limit(room: int) -> Iterator[None]:
    """Stands in for a full disk, which would need a filesystem of its own and root to mount it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 60_000], ids=["no room for the configuration", "no room for the weights"])
def test_a_full_disk_leaves_the_old_model_intact(llama, tmp_path, room):
    folder = llama.save_pretrained(tmp_path / "model")
    before = contents(folder)
    with pytest.raises(Exception, match="File too large"), file_size_limit(room):
        llama.save_pretrained(folder, overwrite=True)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_is_told_in_one_sentence(llama, tmp_path):
    with pytest.raises(PalimpsestError, match="what was there is intact"), file_size_limit(60_000):
        llama.save_pretrained(tmp_path / "model")


def test_damaged_weights_are_not_loaded(llama, tmp_path, run):
    folder = llama.save_pretrained(tmp_path / "model")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(PalimpsestError, match=r"Nothing was loaded"):
        load(folder, run=run)


def test_a_copy_is_independent(causal_lm):
    twin = causal_lm.copy()
    assert twin.digest() == causal_lm.digest()
    before = causal_lm.digest()
    with torch.no_grad():
        next(twin.network.parameters()).add_(1)
    twin.ledger = twin.ledger.add(ENTRY)
    assert causal_lm.digest() == before != twin.digest()
    assert causal_lm.ledger.entries == ()


def test_a_copy_keeps_tied_weights_tied(llama):
    twin = llama.copy().network
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_model_without_a_tokenizer_says_so(llama):
    with pytest.raises(PalimpsestError, match="LlamaForCausalLM has no tokenizer"):
        _ = Model(llama.network).tokenizer


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), r"1 tensor is missing \(first: model\.norm\.weight\)"),
        (
            lambda state: state.update(extra=torch.zeros(1), more=torch.zeros(1)),
            r"2 tensors are unexpected \(first: extra\)",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(5)}),
            r"model\.norm\.weight has shape \[5\], expected \[32\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused(saved, run, change, message):
    change_weights(saved, change)
    with pytest.raises(PalimpsestError, match=message):
        load(saved, run=run)


def test_pickled_weights_are_refused_unread(saved, run, tmp_path):
    (saved / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"x": Trap()}, saved / "pytorch_model.bin")
    with pytest.raises(PalimpsestError, match=r"pickled weights only \(pytorch_model\.bin\).*run code.*safetensors"):
        load(saved, run=run)
    assert not (tmp_path / "executed").exists()


def test_code_in_a_checkpoint_is_not_run(saved, run, tmp_path):
    (saved / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass C: pass\n")
    path = saved / "config.json"
    settings = json.loads(path.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    path.write_text(json.dumps(settings))
    with pytest.raises(PalimpsestError, match="cannot be loaded"):
        load(saved, run=run)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be loaded"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer of .* cannot be loaded"),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "holds an adapter, not a model",
        ),
    ],
    ids=["config", "bad config", "weights", "bad weights", "tokenizer", "bad tokenizer", "adapter"],
)
def test_an_incomplete_folder_is_told_in_one_sentence(saved, run, spoil, message):
    spoil(saved)
    with pytest.raises(PalimpsestError, match=message) as caught:
        load(saved, run=run)
    assert "\n" not in str(caught.value)


def test_gpt2_without_a_tokenizer_is_not_given_an_empty_one(gpt2, tmp_path, run):
    gpt2.network.save_pretrained(tmp_path / "m")
    with pytest.raises(PalimpsestError, match="has no tokenizer"):
        load(tmp_path / "m", run=run)
