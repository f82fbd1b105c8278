"""A tokenizer made from texts: byte-level BPE, which has a token for every text.

Source: Sennrich et al. 2016 (arXiv 1508.07909) on bytes, as in Radford et al. 2019; by the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MARKS = ("eos_token", "bos_token", "pad_token")


def byte_pairs(texts: Iterable[str], size: int, marks: Mapping[str, str]) -> Any:
    """A tokenizer of at most `size` tokens, among them the marks (`{"eos_token": "<eos>", ...}`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=sorted(set(marks.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def marks_of(tokenizer: Any) -> dict[str, str]:
    """The marks that a tokenizer uses."""
    return {name: str(mark) for name in MARKS if (mark := getattr(tokenizer, name))}
