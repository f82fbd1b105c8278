"""Greedy generation in batches, through the network's own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from palimpsest.data.encoding import Encoder
from palimpsest.models.model import Model
from palimpsest.run import Run

BATCH = 64


@torch.no_grad()
def continue_tokens(
    model: Model, prompts: Sequence[Sequence[int]], run: Run, max_new_tokens: int, label: str = "generating"
) -> list[list[int]]:
    """The greedy continuation of each token sequence, without what comes after its end mark."""
    network, tokenizer = model.network.eval(), model.tokenizer
    stop = _stop_tokens(network, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for batch in run.track(batches, label):
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=model.device
        )
        generated = network.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=sorted(stop),
        )[:, width:].tolist()
        for i, tokens in zip(batch, generated, strict=True):
            end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
            results[i] = tokens[:end]
    return results


def greedy_answers(
    model: Model, questions: Sequence[str], run: Run, max_new_tokens: int, label: str = "answering"
) -> list[str]:
    """The greedy answer to each question, in the model's chat template where it has one."""
    encoder = Encoder.of(model)
    generated = continue_tokens(model, [encoder.prompt(q) for q in questions], run, max_new_tokens, label)
    return [text.strip() for text in model.tokenizer.batch_decode(generated, skip_special_tokens=True)]


def _stop_tokens(network: Any, tokenizer: Any) -> set[int]:
    configured = getattr(network.generation_config, "eos_token_id", None)
    stop = set(configured if isinstance(configured, list) else [configured])
    return (stop | {tokenizer.eos_token_id}) - {None}
