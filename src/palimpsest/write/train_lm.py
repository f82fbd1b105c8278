"""Trains a language model with a memory of its own kind from a text corpus.

For comparing memories: the same small decoder, the same tokens, another token mixer (`palimpsest.models.memory_lm`).
The texts of the role `train` are joined, with the end mark between them, and cut into windows of `length` tokens that
overlap by one, so that every token but the very first is predicted once; records that are no plain texts are sequences
of their own. Perplexity is measured on the role `validation`, or on the last windows, which are then not trained on.

The given model lends its tokenizer and nothing else. With `vocabulary`, a byte-level BPE tokenizer of that size is made
from the corpus instead, which a small model is better served by.

    loss = mean token NLL + penalty_weight * sum of the mixers' penalties;   PPL = exp(mean token NLL)

Sources: the decoder, Touvron et al. 2023 (arXiv 2302.13971), its mixer exchanged; byte-level BPE, Radford et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from palimpsest.data.byte_pairs import byte_pairs, marks_of
from palimpsest.data.encoding import Encoded
from palimpsest.data.records import Record, Roles
from palimpsest.data.windows import windows
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import sequence_nll
from palimpsest.system import Method, setting, settings, system
from palimpsest.train import Training, schedule, train


@settings
class Size:
    """How large the model is."""

    layers: int = setting(default=4, at_least=1, origin="ours", help="blocks")
    width: int = setting(default=256, at_least=2, origin="ours", help="numbers a token")
    heads: int = setting(default=4, at_least=1, origin="ours", help="heads of the token mixer")
    inner: int | None = setting(
        default=None,
        at_least=1,
        origin="Touvron et al. 2023",
        help="width of the channel mixer; None: 8/3 of the width",
    )


@settings
class Corpus:
    """How texts become windows of tokens."""

    length: int = setting(default=256, at_least=2, origin="ours", help="tokens a window")
    vocabulary: int | None = setting(
        default=None, at_least=300, origin="ours", help="size of a tokenizer made from the texts; None: the model's"
    )
    held_out: float = setting(
        default=0.05, at_least=0, below=1, origin="ours", help="share of windows to measure on, without validation data"
    )


TRAINING = Training(
    learning_rate=1e-3,
    epochs=1,
    batch_size=16,
    weight_decay=0.01,
    warmup_epochs=0.05,
    decay="cosine",
    micro_tokens=4096,
)


@system(
    "train-lm",
    verb="write",
    title="A language model trained from scratch, its memory a choice",
    paper="",
    needs={"train"},
    uses={"validation"},
    fidelity="standard practice",
)
class TrainLM(Method):
    """Trains the decoder of `palimpsest.models.memory_lm` with the named token mixer on the role `train`."""

    mixer: str = setting(
        default="gated-delta",
        origin="ours",
        help="token mixer: attention, linear-attention, gated-linear-attention, delta, gated-delta, mom, titans",
    )
    window: int | None = setting(
        default=None, at_least=1, origin="ours", help="how many tokens attention looks back; None: all (attention only)"
    )
    size: Size = setting(default=Size(), origin="ours", help="how large the model is")
    corpus: Corpus = setting(default=Corpus(), origin="ours", help="how texts become windows")
    training: Training = setting(default=TRAINING, origin="ours", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The new model; perplexity over the steps is in its ledger entry."""
        if self.window is not None and self.mixer != "attention":
            raise PalimpsestError(f"window is a setting of attention; the mixer is {self.mixer}. Leave it out.")
        chosen = {} if self.window is None else {"window": self.window}
        return trained_memory(self, model, data, run, self.mixer, chosen)


def trained_memory(
    method: Any, model: Model, data: Roles, run: Run, mixer: str, chosen: dict[str, Any], penalty_weight: float = 0.0
) -> Model:
    """A new memory language model, trained as the fields of `TrainLM` say, which `method` has too."""
    from palimpsest.models.memory_lm import MemoryForCausalLM, MemoryLMConfig

    size, corpus, training = method.size, method.corpus, method.training
    processor = model.processor
    if corpus.vocabulary is not None:
        texts = [text for r in data.train for text in (r.text, r.prompt, r.answer) if text]
        processor = byte_pairs(texts, corpus.vocabulary, marks_of(model.tokenizer))
    tokenizer = getattr(processor, "tokenizer", processor)
    config = MemoryLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        mixer=mixer,
        mixer_settings=chosen,
        penalty_weight=penalty_weight,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network: Any = MemoryForCausalLM(config)
    student = Model(network, processor).to(run.torch_device())
    learned, measured = _split(student, data, corpus)
    plan = schedule(student, training, run, train=learned)
    memory: dict[str, Any] = {"perplexity": []}
    trained = train(
        student,
        plan,
        lambda batch: batch.train.cross_entropy + network.penalty(),
        training,
        run.replace(in_place=True),
        stop=_watch(measured, len(plan.steps), memory, run),
        memory=memory,
        label=f"training {mixer}",
    )
    run.note(tokens=sum(len(window.targets) for window in learned) * training.epochs, parameters=trained.parameters)
    return trained


def perplexity(model: Model, sequences: Sequence[Encoded], run: Run) -> float:
    """exp of the mean negative log-likelihood a token."""
    nll = sequence_nll(model, sequences, run.replace(progress=False))
    return math.exp(float(nll.sum()) / sum(len(sequence.targets) for sequence in sequences))


def ended(records: Sequence[Record], tokenizer: Any) -> list[Record]:
    """The records, each plain text with the tokenizer's end mark, where it has one, behind it."""
    return [
        record if record.text is None else Record(text=record.text + (tokenizer.eos_token or "")) for record in records
    ]


def _split(model: Model, data: Roles, corpus: Corpus) -> tuple[list[Encoded], list[Encoded]]:
    """What is trained on, and what perplexity is measured on."""
    learned, *given = (
        windows(model, ended(data[role], model.tokenizer), corpus.length + 1, corpus.length, join=True)
        for role in ("train", "validation")
        if role in data
    )
    if given:
        return learned, given[0]
    kept = max(1, len(learned) - round(corpus.held_out * len(learned)))
    return learned[:kept], learned[kept:]


def _watch(measured: Sequence[Encoded], steps: int, memory: dict[str, Any], run: Run, points: int = 10) -> Any:
    """Measures perplexity at a few steps, the last among them."""
    at = {round(steps * (i + 1) / points) for i in range(points)}

    def stop(step: int, model: Model) -> bool:
        if measured and step in at:
            with torch.random.fork_rng(devices=[]):
                memory["perplexity"].append(perplexity(model, measured, run))
            run.note(validation_perplexity=memory["perplexity"], final_perplexity=memory["perplexity"][-1])
        return False

    return stop
