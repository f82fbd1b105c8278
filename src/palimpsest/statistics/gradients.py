"""The gradients of one weight for each example of a batch, kept as factors until a number is made from them.

A weight's gradient for one example is a sum over its positions of outer products. It need not be formed to know its
norm or a projection of it, and to add up squares it is formed in pieces that fit the processor's cache.

    a_t     right  [batch, blocks, positions, columns]  what the weight was multiplied with
    g_t     left   [batch, blocks, positions, rows]     gradient of the example's loss at the weight's output
    G_e = sum_t g_t a_t^T                               the gradient of one block of the weight, for one example

    sum_e G_e^2                            squares over examples, of gradients that are formed; or, at few positions,
      = sum_e sum_ts (g_t g_s)^T (a_t a_s)   as one product over all pairs of positions that have a gradient
    |G_e|^2 = sum_ts (g_t.g_s)(a_t.a_s)    or formed outright, whichever takes fewer multiplications

An embedding is a linear layer whose inputs are one-hot; a grouped convolution has a block a group; a mixture of experts
has a block an expert, and each of its positions belongs to the example of its token. A weight that is used more than
once (tied embeddings) has the sum of all its uses.

Source: ghost norms, Goodfellow 2015 (arXiv 1510.01799), Li et al. 2022 (arXiv 2110.05679).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CACHE = 1 << 18
"""Numbers of a product that are formed at once: what the processor's cache holds."""
FEW = 8
"""Positions of an example up to which all pairs are multiplied sooner than the gradient of a large weight is formed."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """Sums over positions of outer products, a block at a time."""

    left: Float[Tensor, "batch blocks positions rows"]
    right: Float[Tensor, "batch blocks positions columns"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Outer products whose left factor is one-hot: rows `tokens` of the gradient get `right`."""

    tokens: Int[Tensor, "batch positions"]
    right: Float[Tensor, "batch positions columns"]


@dataclasses.dataclass(frozen=True)
class Routed:
    """Outer products that belong to an example and a block (an expert) each."""

    left: Float[Tensor, "slots rows"]
    right: Float[Tensor, "slots columns"]
    example: Int[Tensor, " slots"]
    block: Int[Tensor, " slots"]


@dataclasses.dataclass(frozen=True)
class Dense:
    """The gradients themselves."""

    values: Float[Tensor, "batch ..."]


Piece = Outer | Rows | Routed | Dense


class Gradient:
    """The gradients of one weight for each example of a batch."""

    def __init__(self, name: str, shape: torch.Size, examples: int, pieces: Sequence[Piece]) -> None:
        self.name, self.shape, self.examples = name, shape, examples
        by_kind: dict[type, list[Any]] = {}
        for piece in pieces:
            by_kind.setdefault(type(piece), []).append(piece)
        self.outer: Outer | None = _joined(by_kind.get(Outer), axis=2)
        self.rows: Rows | None = _joined(by_kind.get(Rows), axis=1)
        self.routed: Routed | None = _joined(by_kind.get(Routed), axis=0)
        given = by_kind.get(Dense)
        self._dense = sum((piece.values for piece in given[1:]), given[0].values) if given else None
        if len(by_kind) > 1 and (self.routed is not None or self._dense is not None):
            self._dense = self.dense()
            self.outer = self.rows = self.routed = None

    def dense(self) -> Float[Tensor, "batch ..."]:
        """The gradients as one tensor: as large as the weight for every example."""
        total = self._zeros(self.examples, *self.shape) if self._dense is None else self._dense.clone()
        if self.outer is not None:
            total.add_((self.outer.left.mT @ self.outer.right).reshape(total.shape))
        if self.rows is not None:
            place = torch.arange(self.examples, device=total.device)[:, None].expand_as(self.rows.tokens)
            total.index_put_((place, self.rows.tokens), self.rows.right, accumulate=True)
        if self.routed is not None:
            groups = _grouped(self.routed, self.shape[0])
            total[groups.example, groups.block] += groups.left.mT @ groups.right
        return total

    def add_squares(self, total: Tensor) -> None:
        """Adds the squares of all gradients, summed over the examples, to a tensor of the weight's shape."""
        if self._dense is not None:
            total.add_(self._dense.square().sum(0))
        if self.outer is not None:
            blocks, rows = self.outer.left.shape[1], self.outer.left.shape[3]
            _add_outer_squares(self.outer, total.view(blocks, rows, -1))
        if self.rows is not None:
            self._add_row_squares(self.rows, total)
        if self.routed is not None:
            groups = _grouped(self.routed, self.shape[0])
            step = max(1, CACHE // (self.shape[1] * self.shape[2]))
            for start in range(0, len(groups.block), step):
                part = slice(start, start + step)
                product = groups.left[part].mT @ groups.right[part]
                total.index_add_(0, groups.block[part], product.square_().to(total.dtype))

    def squared_norms(self) -> Float[Tensor, " batch"]:
        """The squared L2 norm of each example's gradient."""
        if self._dense is not None:
            return self._dense.flatten(1).square().sum(1)
        norms = self._zeros(self.examples)
        if self.outer is not None:
            norms += _outer_norms(self.outer.left, self.outer.right).sum(1)
        if self.rows is not None:
            same = self.rows.tokens[:, :, None] == self.rows.tokens[:, None, :]
            norms += ((self.rows.right @ self.rows.right.mT) * same).sum((1, 2))
            if self.outer is not None:
                inner = self.outer.right[:, 0] @ self.rows.right.mT
                norms += 2 * (inner * self._at_tokens(self.rows)).sum((1, 2))
        if self.routed is not None:
            groups = _grouped(self.routed, self.shape[0])
            norms.index_add_(0, groups.example, _outer_norms(groups.left[:, None], groups.right[:, None])[:, 0])
        return norms

    def _at_tokens(self, rows: Rows) -> Float[Tensor, "batch positions places"]:
        """The left factors in the rows that the tokens stand for."""
        assert self.outer is not None
        left = self.outer.left[:, 0]
        return left.gather(2, rows.tokens[:, None, :].expand(-1, left.shape[1], -1))

    def _add_row_squares(self, rows: Rows, total: Tensor) -> None:
        """(H + E)^2 - H^2 where E is not zero; H, the outer products, has been added."""
        same = rows.tokens[:, :, None] == rows.tokens[:, None, :]
        first = ~same.tril(-1).any(-1)
        sums = same.to(rows.right) @ rows.right
        added = sums.square()
        if self.outer is not None:
            added += 2 * sums * (self._at_tokens(rows).mT @ self.outer.right[:, 0])
        total.index_add_(0, rows.tokens[first], added[first].to(total.dtype))

    def _zeros(self, *size: int) -> Tensor:
        like = next(p for p in (self.outer, self.rows, self.routed) if p is not None).right
        return like.new_zeros(size)


def _joined(uses: Sequence[Any] | None, axis: int) -> Any:
    """Several uses of a weight as one: their positions side by side."""
    if not uses or len(uses) == 1:
        return uses[0] if uses else None
    names = [field.name for field in dataclasses.fields(uses[0])]
    return type(uses[0])(**{name: torch.cat([getattr(use, name) for use in uses], axis) for name in names})


def _add_outer_squares(outer: Outer, total: Float[Tensor, "blocks rows columns"]) -> None:
    left, right = outer.left, outer.right
    blocks, rows, columns = total.shape
    positions, fit = left.shape[2], CACHE // total.numel()
    if positions == 1 or (positions <= 4 * FEW and fit < 8):  # a large weight; some positions may be padding
        pairs = _pairs(outer)
        if len(pairs[0]) <= len(left) * FEW * (FEW + 1) / 2:
            _add_squares_by_pairs(outer, *pairs, total)
            return
    if fit > 1:  # several examples at once, flat, so that nothing is to be broadcast
        for g, a in zip(left.flatten(0, 1).split(fit * blocks), right.flatten(0, 1).split(fit * blocks), strict=True):
            product = torch.bmm(g.mT, a).square_()
            total.add_(product.view(-1, blocks, rows, columns).sum(0))
        return
    band = max(1, CACHE // (blocks * columns))
    for into, part in zip(total.split(band, 1), left.split(band, 3), strict=True):
        for g, a in zip(part.mT, right, strict=True):
            product = torch.bmm(g, a)
            into.addcmul_(product, product)


def _pairs(outer: Outer) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """The pairs of positions of one example, each pair once, as places among the positions of all examples."""
    # padding has no gradient, nor has the last token of an example in a language model
    live = _any(outer.left) & _any(outer.right)
    place = torch.arange(live.numel(), device=live.device).view_as(live)
    example, s, t = (live[:, :, None] & live[:, None, :]).tril_().nonzero().unbind(1)
    return place[example, s], place[example, t]


def _any(x: Float[Tensor, "batch blocks positions features"]) -> Bool[Tensor, "batch positions"]:
    """Which positions have a number that is not zero; `Tensor.any` takes five times as long."""
    return ((x.amax(3) != 0) | (x.amin(3) != 0)).any(1)


def _add_squares_by_pairs(
    outer: Outer,
    first: Int[Tensor, " pairs"],
    second: Int[Tensor, " pairs"],
    total: Float[Tensor, "blocks rows columns"],
) -> None:
    def products(x: Float[Tensor, "batch blocks positions features"]) -> Float[Tensor, "blocks pairs features"]:
        x = x.transpose(0, 1).flatten(1, 2)
        return x.index_select(1, first).mul_(x.index_select(1, second))

    right = products(outer.right).mul_(torch.where(first == second, 1, 2)[:, None])
    band = max(1, CACHE // total[:, 0].numel())
    for into, left in zip(total.split(band, 1), outer.left.split(band, 3), strict=True):
        # a sum of squares is not below 0, but rounding may be where terms cancel
        into.add_((products(left).mT @ right).clamp_min_(0))


def _outer_norms(
    left: Float[Tensor, "batch blocks positions rows"], right: Float[Tensor, "batch blocks positions columns"]
) -> Float[Tensor, "batch blocks"]:
    positions, rows, columns = left.shape[2], left.shape[3], right.shape[3]
    if positions * (rows + columns) <= rows * columns:
        return ((left @ left.mT) * (right @ right.mT)).sum((2, 3))
    step = max(1, CACHE // (left.shape[1] * rows * columns))
    parts = zip(left.split(step), right.split(step), strict=True)
    return torch.cat([(g.mT @ a).square_().sum((2, 3)) for g, a in parts])


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The slots of each (example, block) that has any, padded with zeros to the largest number."""

    left: Float[Tensor, "groups most rows"]
    right: Float[Tensor, "groups most columns"]
    example: Int[Tensor, " groups"]
    block: Int[Tensor, " groups"]


def _grouped(routed: Routed, blocks: int) -> _Groups:
    key, order = torch.sort(routed.example * blocks + routed.block, stable=True)
    found, group, count = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    place = torch.arange(len(key), device=key.device) - (count.cumsum(0) - count)[group]
    most = int(count.max())

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(len(found), most, values.shape[1]).index_put_((group, place), values[order])

    return _Groups(padded(routed.left), padded(routed.right), found // blocks, found % blocks)
