"""Fitting with GaLore: it learns, with a smaller state, and layer by layer alike."""

from __future__ import annotations

import dataclasses

import pytest

from conftest import build_model
from memorised import data, quiet
from palimpsest.audit.answer_probability import probabilities
from palimpsest.errors import PalimpsestError
from palimpsest.fit.galore import GaLore
from palimpsest.train import Training

SHORT = Training(learning_rate=3e-2, epochs=40, batch_size=12, weight_decay=0.0, warmup_epochs=0.0, decay="constant")


def test_the_model_learns_with_a_fraction_of_the_state():
    llama, given = build_model("llama"), data()
    result = GaLore(training=SHORT, gap=20).apply(llama, given, quiet())
    assert probabilities(result, given.retain, quiet()).mean() > 0.5
    notes = result.ledger.entries[-1].notes
    matrices = [w for n, w in llama.network.named_parameters() if ".mlp." in n or "attn" in n]
    adam = 8 * sum(w.numel() for w in matrices)
    others = 8 * sum(w.numel() for w in llama.network.parameters()) - adam
    assert notes["state_bytes"] - others < 0.45 * adam
    assert notes["skipped_steps"] == 0


@pytest.mark.parametrize("name", ["gpt2", "vit", "moe"])
def test_it_finds_the_matrices_of_other_networks(name):
    from pictured import pictures

    given = pictures() if name == "vit" else data()
    short = dataclasses.replace(SHORT, max_steps=2)
    result = GaLore(training=short, rank=2).apply(build_model(name), given, quiet())
    assert result.ledger.entries[-1].notes["state_bytes"] > 0


def test_stepping_layer_by_layer_gives_the_same_model():
    free = dataclasses.replace(SHORT, max_steps=4, max_grad_norm=1e9, micro_tokens=100_000)
    whole, layered = (
        GaLore(training=free, gap=2, per_layer=per_layer).apply(build_model("llama"), data(), quiet())
        for per_layer in (False, True)
    )
    assert whole.digest() == layered.digest()


@pytest.mark.parametrize("name", ["galore", "galore-8bit"])
def test_every_method_takes_it_by_name(name):
    from palimpsest.erase.npo import NPO
    from palimpsest.write.finetune import Finetune

    llama, given, short = build_model("llama"), data(), dataclasses.replace(SHORT, max_steps=3, optimizer=name)
    named = Finetune(training=short).apply(llama, given, quiet())
    assert (
        named.digest()
        != Finetune(training=dataclasses.replace(short, optimizer="adamw")).apply(llama, given, quiet()).digest()
    )
    if name == "galore":
        assert named.digest() == GaLore(training=short).apply(llama, given, quiet()).digest()
    assert NPO(training=short).apply(llama, given, quiet()).digest() != llama.digest()
    with pytest.raises(PalimpsestError, match="set lora_rank to 0"):
        NPO(training=dataclasses.replace(short, lora_rank=2)).apply(llama, given, quiet())


def test_what_layer_by_layer_cannot_do_is_refused():
    for training in (SHORT, dataclasses.replace(SHORT, max_grad_norm=1e9, micro_tokens=8)):
        with pytest.raises(PalimpsestError, match="in one piece and without clipping"):
            GaLore(training=training, per_layer=True).apply(build_model("llama"), data(), quiet())
    with pytest.raises(PalimpsestError, match="lora_rank to 0"):
        GaLore(training=dataclasses.replace(SHORT, lora_rank=2)).apply(build_model("llama"), data(), quiet())
    with pytest.raises(PalimpsestError, match="rank is 99"):
        GaLore(training=SHORT, rank=99).apply(build_model("llama"), data(), quiet())
