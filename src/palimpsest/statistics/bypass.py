"""How much each block of a language model matters: what the loss gains when the block is skipped.

    L          mean negative log-likelihood of a token, nats, over the given sequences
    L_hat(l)   the same with block l replaced by the identity (its residual stream goes past it)
    I(l) = L_hat(l) - L

Up to block l the network computes what it always does: that part is taken from one whole run, so that all blocks
together cost half of what as many runs would.

Source: Zhang et al. 2025 (arXiv 2510.10071), stage 1, and the authors' code, which sets a block's weights to zero: the
same for blocks that normalise before and add after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.data.encoding import Encoded
from palimpsest.data.packing import Packed, packer, rows
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import evaluating
from palimpsest.statistics.likelihood import ROW_TOKENS


@torch.no_grad()
def bypass_importance(model: Model, sequences: Sequence[Encoded], run: Run) -> Float[Tensor, " layers"]:
    """I of each block; raises where a loss is not a number, naming the block."""
    if not sequences:
        raise PalimpsestError("the set that blocks are measured on is empty.")
    network = model.network
    blocks = [part.module for part in anatomy(network).blocks()]
    if not blocks:
        raise PalimpsestError(f"{type(network).__name__} has no list of blocks that could be skipped.")
    arrange = packer(network)
    whole, skipped, targets = 0.0, torch.zeros(len(blocks), dtype=torch.float64), 0
    seen: dict[str, tuple[Tensor, Any]] = {}

    def keep(call: Call, output: Any) -> None:
        seen[call.key] = call.input, output

    with evaluating(network):
        for group in run.track(list(rows(sequences, ROW_TOKENS)), "measuring blocks"):
            packed = arrange([sequences[i] for i in group]).to(model.device)
            with watch({str(i): block for i, block in enumerate(blocks)}, forward=keep):
                whole += _loss(network, packed)
            for layer in range(len(blocks)):
                with _past(blocks, layer, seen):
                    skipped[layer] += _loss(network, packed)
            targets += len(packed.targets)
    for layer, value in enumerate(skipped.tolist()):
        if not torch.isfinite(torch.tensor([whole, value])).all():
            raise PalimpsestError(f"the loss with block {layer} skipped is not a number.")
    return (skipped - whole) / targets


def _loss(network: Any, packed: Packed) -> float:
    """Summed negative log-likelihood of the targets."""
    return float(nn.functional.cross_entropy(packed.target_logits(network), packed.targets, reduction="sum"))


@contextlib.contextmanager
def _past(blocks: Sequence[nn.Module], layer: int, seen: Mapping[str, tuple[Tensor, Any]]) -> Iterator[None]:
    """Inside, the blocks below are not run, and this one gives out what it was given in the whole run."""
    state, _ = seen[str(layer)]

    def forward(i: int) -> Any:
        _, output = seen[str(i)]
        return lambda *_, **__: state if isinstance(output, Tensor) else (state, *output[1:])

    for i in range(layer + 1):
        blocks[i].forward = forward(i)
    try:
        yield
    finally:
        for i in range(layer + 1):
            del blocks[i].forward
