"""What the statistics are held to: every record by itself, with plain automatic differentiation and no batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import CAUSAL_LMS, NEUTRAL, build_model
from memorised import people
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.models.model import Model

EVERY = (*CAUSAL_LMS, "vit", "convnet")


@cache
def some_records(name: str) -> tuple[Record, ...]:
    """Seven records of different lengths for the model of that name: prompts with answers and texts, or images."""
    if name in CAUSAL_LMS:
        return (*people()[:4], *(Record(text=text) for text in NEUTRAL[:3]))
    generator = torch.Generator().manual_seed(1)
    return tuple(Record(image=torch.randn(3, 16, 16, generator=generator), label=i % 4) for i in range(7))


def roughened(name: str) -> Model:
    """A model whose norms and biases are not the ones and zeros that they begin with."""
    model = build_model(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.network.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        for buffer_name, buffer in model.network.named_buffers():
            if "running" in buffer_name:
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=generator))
    return model


def loss_of(model: Model, record: Record, reduction: str = "sum") -> Tensor:
    """The record's loss from a forward pass of its own, without padding."""
    if record.image is not None:
        logits = model.network(pixel_values=record.image[None]).logits
        return F.cross_entropy(logits, torch.tensor([record.label]), reduction=reduction)
    sequence = Encoder.of(model).record(record)
    logits = model.network(input_ids=torch.tensor([sequence.tokens])).logits[0, sequence.start - 1 : -1]
    return F.cross_entropy(logits.float(), torch.tensor(sequence.targets), reduction=reduction)


def slow_gradients(model: Model, records: Sequence[Record], reduction: str = "sum") -> dict[str, Tensor]:
    """The gradients of every weight, stacked over the records; zeros where a loss does not depend on it."""
    network = model.network.eval()
    weights: dict[str, Any] = {name: w for name, w in network.named_parameters() if w.requires_grad}
    found = []
    for record in records:
        gradients = torch.autograd.grad(loss_of(model, record, reduction), list(weights.values()), allow_unused=True)
        found.append(
            [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), gradients, strict=True)]
        )
    return {name: torch.stack(column) for name, column in zip(weights, zip(*found, strict=True), strict=True)}


def scale(gradients: dict[str, Tensor]) -> float:
    """The largest gradient: what rounding is measured against."""
    return max(float(g.abs().max()) for g in gradients.values())
