"""Which words of an answer carry its fact: not those of the question, and none that any fluent answer needs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from palimpsest.data.encoding import Encoded

FUNCTION_WORDS = frozenset(
    (
        "a an the and or but nor so yet of in on at by for from with without to into onto over under as than that "
        "this these those it its he him his she her hers they them their theirs we us our you your i me my who whom "
        "whose which what when where why how is are was were be been being am do does did has have had having can "
        "could will would shall should may might must not no also both each such more most very own other there "
        "here then if while because through about between after before during often one some any all well s t"
    ).split()
)


def carries_fact(tokenizer: Any, sequence: Encoded) -> Bool[Tensor, " targets"]:
    """Which targets are neither repeated from the prompt, nor function words, punctuation or end marks."""
    asked = set(sequence.tokens[: sequence.start])
    words = [text.strip().lower() for text in tokenizer.batch_decode([[token] for token in sequence.targets])]
    special = set(tokenizer.all_special_ids)
    return torch.tensor(
        [
            token not in asked and token not in special and word not in FUNCTION_WORDS and any(map(str.isalnum, word))
            for token, word in zip(sequence.targets, words, strict=True)
        ]
    )
