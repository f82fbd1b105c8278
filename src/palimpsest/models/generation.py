"""Generation in batches, greedy unless more is asked for, through the network's own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import StoppingCriteria

from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import window_of
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run

BATCH = 64


@torch.no_grad()
def continue_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    run: Run,
    max_new_tokens: int,
    label: str = "generating",
    ends: Sequence[str] = (),
    **how: Any,
) -> list[list[int]]:
    """The greedy continuation of each token sequence, without what comes after its end mark.

    It also ends where one of the texts `ends` has been said. `how` is for `generate`: `num_beams`, `bad_words_ids` and
    the like.
    """
    beams = how.get("num_beams") or 1
    network, tokenizer = model.network.eval(), model.tokenizer
    stop = _stop_tokens(network, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    size = max(1, BATCH // beams)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for batch in run.track(batches, label):
        longest = max(len(prompts[i]) for i in batch) + max_new_tokens
        # what looks back a number of places only would count the padding in between
        shared = _shared([prompts[i] for i in batch]) if longest <= window_of(network) else 0
        rests = [prompts[i][shared:] for i in batch]
        width = max(map(len, rests))
        # padding stands between the shared beginning and the rest, so that the beginning is computed once for all
        ids = [[*prompts[i][:shared], *[pad] * (width - len(r)), *r] for i, r in zip(batch, rests, strict=True)]
        mask = [[1] * shared + [0] * (width - len(rest)) + [1] * len(rest) for rest in rests]
        generated = network.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            cache=_cache(network, prompts[batch[0]][:shared], len(batch) * beams, model.device),
            max_new_tokens=min(max_new_tokens, _room(network, shared + width, max_new_tokens)),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=sorted(stop),
            stopping_criteria=[_Said(tokenizer, ends, shared + width)] if ends else None,
            **how,
        )[:, shared + width :].tolist()
        for i, tokens in zip(batch, generated, strict=True):
            end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
            results[i] = tokens[:end]
    return results


class _Said(StoppingCriteria):
    """Ends a row that has said one of the texts. (`stop_strings` does not know every kind of tokenizer.)"""

    def __init__(self, tokenizer: Any, ends: Sequence[str], start: int) -> None:
        self._tokenizer, self._ends, self._start = tokenizer, ends, start

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Any, **keywords: Any) -> Bool[Tensor, " b"]:
        said = self._tokenizer.batch_decode(input_ids[:, self._start :])
        return torch.tensor([any(end in text for end in self._ends) for text in said], device=input_ids.device)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, where that is worth a pass of its own; the last token is never shared."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(tuple(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    length = min(length, min(map(len, prompts)) - 1)
    return length if length >= 8 else 0


def _room(network: Any, prompt: int, wanted: int) -> int:
    """How many tokens fit behind the prompt where positions are learned and end; all that are wanted elsewhere."""
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    tables = (m for m in network.modules() if isinstance(m, nn.Embedding) and m is not network.get_input_embeddings())
    if not limit or not any(limit <= table.num_embeddings <= limit + 2 for table in tables):
        return wanted
    if prompt >= limit:
        raise PalimpsestError(f"a prompt of {prompt} tokens leaves no room for an answer in {limit} positions.")
    return limit - prompt


def keeps_cache(network: Any) -> bool:
    """Whether the network's cache can be cut loose from one call and given to the next."""
    shares = getattr(network, "keeps_own_cache", False)
    return bool(shares or getattr(network, "_supports_default_dynamic_cache", lambda: True)())


def _cache(network: Any, beginning: Sequence[int], copies: int, device: torch.device) -> Any:
    """The network's key-value cache after the beginning, for a batch; None where there is nothing to share."""
    if not beginning or not keeps_cache(network):
        return None
    ids = torch.tensor([list(beginning)], device=device)
    cache = network(input_ids=ids, use_cache=True).cache  # the network knows what kind of cache it keeps
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", ())):
        return None  # states of some recurrent layers cannot be copied for several rows
    cache.batch_repeat_interleave(copies)
    return cache


def greedy_answers(
    model: Model, questions: Sequence[str], run: Run, max_new_tokens: int, label: str = "answering", **how: Any
) -> list[str]:
    """The greedy answer to each question, in the model's chat template where it has one; `how` is for `generate`."""
    if not questions:
        return []
    encoder = Encoder.of(model)
    generated = continue_tokens(model, [encoder.prompt(q) for q in questions], run, max_new_tokens, label, **how)
    return [text.strip() for text in model.tokenizer.batch_decode(generated, skip_special_tokens=True)]


def _stop_tokens(network: Any, tokenizer: Any) -> set[int]:
    configured = getattr(network.generation_config, "eos_token_id", None)
    stop = set(configured if isinstance(configured, list) else [configured])
    return (stop | {tokenizer.eos_token_id}) - {None}
