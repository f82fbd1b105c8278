"""What a method did to the weights: how many numbers changed, and by how much in each part of each layer."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import torch

from palimpsest.models.anatomy import anatomy

COARSE = ("attention", "mlp", "router")


@dataclasses.dataclass(frozen=True)
class Change:
    """Changed numbers of all, and for (layer, part) the norm of the change over the norm before."""

    changed: int
    total: int
    relative: dict[tuple[str, str], float]


@torch.no_grad()
def weight_change(before: Any, after: Any) -> Change:
    """The difference between two networks of the same architecture, layer by layer."""
    where = _parts(before)
    moved: dict[tuple[str, str], float] = defaultdict(float)
    size: dict[tuple[str, str], float] = defaultdict(float)
    changed = total = 0
    other = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        difference = other[name].float() - weight.float()
        place = where.get(name, ("", "embedding" if "embed" in name or "wte" in name else "other"))
        moved[place] += float(difference.square().sum())
        size[place] += float(weight.float().square().sum())
        changed += int(torch.count_nonzero(difference))
        total += weight.numel()
    return Change(changed, total, {place: math.sqrt(moved[place] / max(size[place], 1e-30)) for place in moved})


def _parts(network: Any) -> dict[str, tuple[str, str]]:
    """The (layer, part) of every parameter name inside a block."""
    plan = anatomy(network)
    where: dict[str, tuple[str, str]] = {}
    for block in plan.blocks():
        for name in block.tensors():
            where[name] = (str(block.layer), "norm")
    for role in COARSE:
        for part in plan.find(role):
            for name in (f"{part.path}.{parameter}" for parameter in part.parameters):
                if name in where:
                    where[name] = (str(part.layer), role)
    return where
