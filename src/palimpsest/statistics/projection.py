"""A few numbers for each example that stand for its whole gradient: random projections, for attribution (TRAK).

Both maps have random signs as entries and keep inner products on average: E <P G, P H> = <G, H>.

    dense      P vec(G) / sqrt(size)                  P [numbers of the weight, size]
    kronecker  sum_t (L^T g_t) (R^T a_t)^T            L [rows, left] / sqrt(left), R [columns, right] / sqrt(right)

The dense map forms every gradient and takes `size` multiplications for each of its numbers: for small networks. The
Kronecker-structured one projects the factors of a gradient, which is then never formed and costs next to nothing, but
it is coarser: a squared norm is off by sqrt(2 / left + 2 / right) where the gradient is one outer product, by less
where it is a sum of many; the dense one is off by sqrt(2 / size).

Sources: TRAK, Park et al. 2023 (arXiv 2303.14186); Kronecker-structured projections, Choe et al. 2024
(arXiv 2405.13954).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Examples, Minibatch, Reduction, TargetLoss, cross_entropy
from palimpsest.statistics.gradients import Gradient
from palimpsest.statistics.per_example import Choose, stream_gradients

BAND = 1 << 22
"""Signs of the dense map that are made at once."""
KEPT = 1 << 28
"""Signs that are kept in memory, a byte each; those of larger maps are made anew for every batch."""


class DenseProjection:
    """Maps all weights' gradients together to `size` numbers; every weight has signs of its own."""

    def __init__(self, size: int = 512, seed: int = 0) -> None:
        _positive(size=size)
        self.size, self.seed = size, seed
        self._kept: dict[str, Tensor] = {}

    def __call__(self, gradient: Gradient) -> Float[Tensor, "batch size"]:
        """What one weight adds to each example's projection."""
        values = gradient.dense().flatten(1)
        total = values.new_zeros(len(values), self.size)
        for number, part in enumerate(values.split(max(1, BAND // self.size), dim=1)):
            total += part @ self.signs(gradient.name, number, part.shape[1]).to(values)
        return total / math.sqrt(self.size)

    def signs(self, name: str, band: int, height: int) -> Float[Tensor, "height size"]:
        """The rows of a weight's map that belong to this band of its numbers."""
        key = f"{name}|{band}"
        found = self._kept.get(key)
        if found is None:
            found = _signs(self.seed, key, height * self.size)
            if sum(kept.numel() for kept in self._kept.values()) + found.numel() <= KEPT:
                self._kept[key] = found
        return found.view(height, self.size)


class KroneckerProjection:
    """Maps all weights' gradients together to `left * right` numbers by their factors.

    Weights that are no matrices (norms, biases) are mapped densely. Every weight has signs of its own.
    """

    def __init__(self, left: int = 32, right: int = 32, seed: int = 0) -> None:
        _positive(left=left, right=right)
        self.left, self.right, self.seed, self.size = left, right, seed, left * right
        self._dense = DenseProjection(self.size, seed)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, gradient: Gradient) -> Float[Tensor, "batch size"]:
        """What one weight adds to each example's projection."""
        found: list[Tensor] = []
        name, outer, rows, routed = gradient.name, gradient.outer, gradient.rows, gradient.routed
        if outer is not None:
            left, right = self.signs(name, outer.left.shape[1], outer.left.shape[3], outer.right.shape[3])
            found.append(((outer.left @ left.to(outer.left)).mT @ (outer.right @ right.to(outer.right))).sum(1))
        if rows is not None:
            left, right = self.signs(name, 1, *gradient.shape)
            found.append(left[0].to(rows.right)[rows.tokens].mT @ (rows.right @ right.to(rows.right)))
        if routed is not None:
            left, right = self.signs(name, *gradient.shape)
            thin = routed.left.new_zeros(len(routed.left), self.left)
            for block in routed.block.unique().tolist():
                mine = routed.block == block
                thin[mine] = routed.left[mine] @ left[block].to(thin)
            products = thin[:, :, None] * (routed.right @ right.to(thin))[:, None, :]
            total = thin.new_zeros(gradient.examples, self.left, self.right)
            found.append(total.index_add_(0, routed.example, products))
        if not found:
            return self._dense(gradient)
        return sum(found[1:], found[0]).flatten(1) / math.sqrt(self.size)

    def signs(
        self, name: str, blocks: int, rows: int, columns: int
    ) -> tuple[Float[Tensor, "blocks rows left"], Float[Tensor, "columns right"]]:
        """L and R of a weight with this many blocks of rows and columns, before they are scaled."""
        if name not in self._kept:
            left = _signs(self.seed, f"{name}|left", blocks * rows * self.left).view(blocks, rows, self.left)
            right = _signs(self.seed, f"{name}|right", columns * self.right).view(columns, self.right)
            self._kept[name] = left, right
        return self._kept[name]


Projection = DenseProjection | KroneckerProjection


def projected_gradients(
    model: Model,
    records: Sequence[Any],
    run: Run,
    projection: Projection,
    *,
    reduction: Reduction = "sum",
    loss: TargetLoss = cross_entropy,
    only: Choose | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Float[Tensor, "examples size"]:
    """The projection of the gradient of each record's loss, over all trainable weights."""
    examples = Examples(model, records, max_length, warn=run.warn)
    values = torch.zeros(len(examples), projection.size)

    def receive(batch: Minibatch, gradient: Gradient) -> None:
        values[batch.index] += projection(gradient).to(values)

    stream_gradients(
        model,
        examples,
        run,
        receive,
        reduction=reduction,
        loss=loss,
        only=only,
        batch_size=batch_size,
        label="projected gradients",
    )
    return values


def _signs(seed: int, name: str, count: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8) * 2 - 1


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise PalimpsestError(f"projection: {name} is {size}, expected at least 1.")
