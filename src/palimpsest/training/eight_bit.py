"""Optimizer states in 8 bits: codes of levels that are dense towards 0, with a scale for every block of 256 numbers.

Source: dynamic quantisation by blocks, Dettmers et al. 2022 (arXiv 2110.02861).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK, LEAST = 256, 4096
"""Numbers that share a scale; tensors of fewer numbers than the second are not worth it."""


def dynamic_levels(signed: bool) -> Float[Tensor, " levels"]:
    """256 numbers up to 1 in order, denser towards 0: each decade down has half as many, at the middles of equal parts.

    Unsigned levels have twice as many a decade, for states that are never negative.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (6 - decade + (not signed))
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0**-decade).tolist()
        found += middles + [-middle for middle in middles if signed]
    return torch.tensor(sorted(found), dtype=torch.float32)


class Quantised:
    """A tensor as codes of 8 bits with a scale for every block; `read` and `write` turn it to float32 and back.

    The nearest level is looked up in a table of all numbers of half precision: 16 times as fast as a search among the
    levels, and another only where a number stands, to half precision, at the middle between two.
    """

    def __init__(self, signed: bool, device: torch.device) -> None:
        self.levels = dynamic_levels(signed).to(device)
        halves = torch.arange(-(2**15), 2**15, device=device).short().view(torch.float16).float()
        self.codes = torch.bucketize(halves, (self.levels[1:] + self.levels[:-1]) / 2).to(torch.uint8)

    def write(self, values: Tensor) -> tuple[UInt8[Tensor, " numbers"], Float[Tensor, " blocks"]]:
        """Codes and scales."""
        flat = values.flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        halves = (blocks / scale.clamp_min(1e-30)[:, None]).half().view(torch.int16)
        code = self.codes.index_select(0, halves.flatten().int() + 2**15)
        return code[: len(flat)].clone(), scale

    def read(self, code: UInt8[Tensor, " numbers"], scale: Float[Tensor, " blocks"]) -> Float[Tensor, " numbers"]:
        """The values, within half a level."""
        values = self.levels.index_select(0, F.pad(code, (0, -len(code) % BLOCK)).int()).view(-1, BLOCK)
        return values.mul_(scale[:, None]).flatten()[: len(code)]


def blocks(part: slice) -> slice:
    """The blocks of these numbers; a part begins and ends where blocks do, or beyond the last."""
    return slice(*(None if place is None else place // BLOCK for place in (part.start, part.stop)))
