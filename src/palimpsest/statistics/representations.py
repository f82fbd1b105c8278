"""What a network makes of its inputs inside: representations by layer, and how alike two networks' are (CKA).

Representations are the outputs of chosen modules, one vector a record: pooled over its positions, or taken at one.
Linear CKA is computed from running sums of cross-products, so any number of records fits:

    x_r, y_r       representations of record r  [d1], [d2], centred over the records
    CKA            ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)
    unbiased CKA   the same with the U-statistic of each HSIC; near 0 for independent features, whatever their width

The plain value is biased upwards where records are not many more than dimensions: about d / (d + n) for independent
isotropic features.

Sources: Kornblith et al. 2019 (arXiv 1905.00414); the unbiased estimator, Song et al. 2012, eq. 5 (JMLR 13).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import capture
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Examples, Minibatch, evaluating

Pool = Literal["auto", "mean", "first", "last", "targets"]
Layers = Iterable[int] | slice | None


@dataclasses.dataclass(frozen=True)
class Represented:
    """The representations of a batch of records, by module; `index` says which records they are."""

    index: Int[Tensor, " batch"]
    layers: dict[str, Float[Tensor, "batch width"]]


def represented_modules(model: Model, wanted: str | Iterable[str], layers: Layers = None) -> dict[str, nn.Module]:
    """The modules of these roles or patterns, by name."""
    return anatomy(model.network).select(wanted, layers).modules()


@torch.no_grad()
def representations(
    model: Model,
    records: Sequence[Any],
    wanted: str | Iterable[str],
    run: Run,
    *,
    layers: Layers = None,
    pool: Pool = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
    label: str = "representations",
) -> Iterator[Represented]:
    """Batch after batch, the outputs of the modules of these roles or patterns, one float32 (or wider) vector a record.

    Pooled over a sequence's own positions (`mean`, what `auto` means), at its `first` or `last` one, or over its scored
    tokens (`targets`). Of images, `mean` is over patches or pixels (`auto`); a vector without positions stays as it is.
    """
    if pool not in get_args(Pool):
        raise PalimpsestError(f"pool is {pool!r}. {nearest(str(pool), get_args(Pool))}")
    modules = represented_modules(model, wanted, layers)
    examples = Examples(model, records, max_length, warn=run.warn)
    if pool == "targets" and examples.classifier:
        raise PalimpsestError("pool is 'targets', but a classifier has no scored tokens. Use mean, first or last.")
    with evaluating(model.network):
        for group in run.track(examples.groups(batch_size), label):
            batch = examples.batch(group)
            with capture(modules) as outputs:
                batch.visit(model.network)
            yield Represented(batch.index, {name: pooled(outputs[name], batch, pool) for name in modules})


def pooled(output: Tensor, batch: Minibatch, pool: Pool) -> Float[Tensor, "batch width"]:
    """One vector a record out of a module's output [batch, positions, width] or [batch, channels, height, width]."""
    values = output if output.dtype == torch.float64 else output.float()
    if values.ndim == 4:
        values = values.flatten(2).mT
    if values.ndim == 2 and len(values) != len(batch):
        values = values.unflatten(0, (len(batch), -1))
    if values.ndim == 2:
        return values
    if pool == "first":
        return values[:, 0]
    real = batch.real
    if real is None or real.shape[1] != values.shape[1]:
        if batch.lengths is not None:
            raise PalimpsestError(
                f"a module gives {values.shape[1]} positions a record where the input has {batch.width}: it cannot be "
                "told which are padding. Choose another module."
            )
        return values[:, -1] if pool == "last" else values.mean(1)
    assert batch.lengths is not None
    if pool == "last":
        return values[torch.arange(len(batch)), batch.lengths - 1]
    if pool == "targets":
        assert batch.packed is not None
        scored = values[batch.packed.row, batch.packed.here]
        total = values.new_zeros(len(batch), values.shape[-1]).index_add_(0, batch.owner, scored)
        return total / batch.count[:, None]
    return torch.where(real[..., None], values, 0).sum(1) / batch.lengths[:, None]


class CrossProducts:
    """Running sums over pairs of representations, in float64, from which linear CKA follows exactly."""

    def __init__(self) -> None:
        self.n = 0
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, x: Float[Tensor, "batch d1"], y: Float[Tensor, "batch d2"]) -> None:
        """Takes in the representations of the same records by two networks."""
        if len(x) != len(y):
            raise PalimpsestError(f"CKA compares the same records: {len(x)} of one network, {len(y)} of the other.")
        x, y = x.double(), y.double()
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise PalimpsestError("a representation has values that are not finite.")
        if self._shift is None:  # near the mean, so that nothing is lost when the mean is taken off in the end
            self._shift = x.mean(0), y.mean(0)
            self._sums = [torch.zeros(())] * 12
        x, y = x - self._shift[0], y - self._shift[1]
        p, q = x.square().sum(1), y.square().sum(1)
        new = [x.sum(0), y.sum(0), x.mT @ x, y.mT @ y, x.mT @ y, p.sum(), q.sum(), p @ p, q @ q, p @ q]
        new += [torch.stack([x.mT @ p, x.mT @ q]), torch.stack([y.mT @ p, y.mT @ q])]
        self._sums = [old + more for old, more in zip(self._sums, new, strict=True)]
        self.n += len(x)

    def cka(self) -> float:
        """Linear CKA; not a number where all representations of one network are equal (it has collapsed)."""
        self._enough(3)
        sx, sy, xx, yy, xy = self._sums[:5]
        centred = [m - torch.outer(a, b) / self.n for m, a, b in ((xx, sx, sx), (yy, sy, sy), (xy, sx, sy))]
        (x, y, both), scale = (m.square().sum() for m in centred), self._scale()
        return float(both / (x * y).sqrt()) if min(x, y) > 1e-24 * scale else math.nan

    def unbiased_cka(self) -> float:
        """CKA from the unbiased estimator of HSIC; may be slightly negative, and NaN where a network has collapsed."""
        self._enough(4)
        both, x, y = self._hsic(0, 1), self._hsic(0, 0), self._hsic(1, 1)
        return both / math.sqrt(x * y) if min(x, y) > 1e-24 * float(self._scale()) else math.nan

    def _hsic(self, first: int, second: int) -> float:
        """Song et al. 2012, eq. 5, written with sums over records; the Gram matrices lose their diagonal."""
        sx, sy, xx, yy, xy, p, q, pp, qq, pq, by_x, by_y = self._sums
        n = self.n
        sums, squares, totals = (sx, sy), (p, q), {(0, 0): xx, (1, 1): yy, (0, 1): xy}
        fourth = {(0, 0): pp, (1, 1): qq, (0, 1): pq}[first, second]
        cross = totals[first, second]
        a, b = sums[first], sums[second]
        trace = cross.square().sum() - fourth
        whole = (a @ a - squares[first]) * (b @ b - squares[second])
        weighted = (by_x, by_y)[first][second], (by_x, by_y)[second][first]
        middle = a @ cross @ b - a @ weighted[0] - b @ weighted[1] + fourth
        return float((trace + whole / ((n - 1) * (n - 2)) - 2 * middle / (n - 2)) / (n * (n - 3)))

    def _scale(self) -> Tensor:
        """Fourth power of the size of the representations before centring: what rounding is measured against."""
        assert self._shift is not None
        sizes = [s.square().sum() * self.n + total for s, total in zip(self._shift, self._sums[5:7], strict=True)]
        return torch.stack(sizes).square().min()

    def _enough(self, least: int) -> None:
        if self.n < least:
            raise PalimpsestError(f"CKA needs at least {least} records, found {self.n}.")


def linear_cka(x: Float[Tensor, "records d1"], y: Float[Tensor, "records d2"], *, unbiased: bool = False) -> float:
    """Linear CKA of two sets of representations of the same records."""
    sums = CrossProducts()
    sums.add(x, y)
    return sums.unbiased_cka() if unbiased else sums.cka()


def compare_representations(
    first: Model,
    second: Model,
    records: Sequence[Any],
    wanted: str | Iterable[str],
    run: Run,
    *,
    layers: Layers = None,
    pool: Pool = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
) -> dict[str, CrossProducts]:
    """The cross-products of two networks' representations of the records, by module; ask them for `cka`.

    Both networks must have the modules, and cut the records into the same batches (the same tokenizer).
    """
    sums: dict[str, CrossProducts] = {}
    given = {"layers": layers, "pool": pool, "batch_size": batch_size, "max_length": max_length}
    of_first = representations(first, records, wanted, run, **given)  # type: ignore[arg-type]
    of_second = representations(second, records, wanted, run.replace(progress=False), **given)  # type: ignore[arg-type]
    for one, other in zip(of_first, of_second, strict=True):
        if not torch.equal(one.index, other.index) or one.layers.keys() != other.layers.keys():
            raise PalimpsestError("the two models cut the records differently or have other modules.")
        for name, x in one.layers.items():
            sums.setdefault(name, CrossProducts()).add(x, other.layers[name])
    return sums
