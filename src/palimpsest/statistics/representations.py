"""What a network makes of its inputs inside: representations by layer, and how alike two networks' are (CKA).

Representations are the outputs of chosen modules, one vector a record: pooled over its positions, or taken at one.
Linear CKA is computed from running sums of cross-products, so any number of records fits:

    x_r, y_r       representations of record r  [d1], [d2], centred over the records
    CKA            ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)
    unbiased CKA   the same with the U-statistic of each HSIC; near 0 for independent features, whatever their width

The plain value is biased upwards where records are not many more than dimensions: about d / (d + n) for independent
isotropic features. While records are fewer than dimensions, the same values come from Gram matrices [n, n].

Sources: Kornblith et al. 2019 (arXiv 1905.00414); the unbiased estimator, Song et al. 2012, eq. 5 (JMLR 13).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import Call, capture, watch
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


@torch.no_grad()
def representations(
    model: Model,
    records: Sequence[Any],
    wanted: str | Iterable[str],
    run: Run,
    *,
    layers: Layers = None,
    inputs: str | None = None,
    pool: Pool = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
    label: str = "representations",
) -> Iterator[Represented]:
    """Batch after batch, the outputs of the modules of these roles or patterns, one float32 (or wider) vector a record.

    Pooled over a sequence's own positions (`mean`, what `auto` means), at its `first` or `last` one, or over its scored
    tokens (`targets`). Of images, `mean` is over patches or pixels (`auto`); a vector without positions stays as it is.
    At the head of a classifier it is that of the last position, where the label is read. `inputs` is a role or pattern
    of modules of which the first input is given, too, as `NAME:input`.
    """
    if pool not in get_args(Pool):
        raise PalimpsestError(f"pool is {pool!r}. {nearest(str(pool), get_args(Pool))}")
    parts = anatomy(model.network)
    modules = parts.select(wanted, layers).modules()
    sources = {} if inputs is None else parts.select(inputs).modules()
    heads = {part.name for part in parts.find("classifier_head")}
    examples = Examples(model, records, max_length, warn=run.warn)
    if pool == "targets" and examples.classifier:
        raise PalimpsestError("pool is 'targets', but a classifier has no scored tokens. Use mean, first or last.")
    given: dict[str, Tensor] = {}

    def keep(call: Call, output: Any) -> None:
        given[f"{call.key}:input"] = call.input

    with evaluating(model.network):
        for group in run.track(examples.groups(batch_size), label):
            batch = examples.batch(group)
            with capture(modules) as outputs, watch(sources, forward=keep):
                batch.visit(model.network)
            found = {name: outputs[name] for name in modules} | given
            vectors = {
                name: pooled(values, batch, "last" if name.partition(":")[0] in heads else pool)
                for name, values in found.items()
            }
            yield Represented(batch.index, vectors)


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
    """Sums over pairs of representations, in float64, from which linear CKA follows exactly.

    While the records are not more than the dimensions they are held, and their Gram matrices do the same for less.
    """

    def __init__(self) -> None:
        self.n = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, x: Float[Tensor, "batch d1"], y: Float[Tensor, "batch d2"]) -> None:
        """Takes in the representations of the same records by two networks."""
        if len(x) != len(y):
            raise PalimpsestError(f"CKA compares the same records: {len(x)} of one network, {len(y)} of the other.")
        x, y = x.double(), y.double()
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise PalimpsestError("a representation has values that are not finite.")
        self.n += len(x)
        if self._shift is None:
            self._rows.append((x, y))
            if self.n <= max(x.shape[1], y.shape[1]):
                return
            x, y = self._held()
            self._rows = []
            self._shift = x.mean(0), y.mean(0)  # so that nothing is lost when the mean is taken off in the end
            self._sums = [torch.zeros(())] * 12
        x, y = x - self._shift[0], y - self._shift[1]
        p, q = x.square().sum(1), y.square().sum(1)
        new = [x.sum(0), y.sum(0), x.mT @ x, y.mT @ y, x.mT @ y, p.sum(), q.sum(), p @ p, q @ q, p @ q]
        new += [torch.stack([x.mT @ p, x.mT @ q]), torch.stack([y.mT @ p, y.mT @ q])]
        self._sums = [old + more for old, more in zip(self._sums, new, strict=True)]

    def cka(self) -> float:
        """Linear CKA; not a number where a network has collapsed."""
        self._enough(3)
        both, x, y = self._products()
        return math.nan if any(self._equal(x, y)) else both / math.sqrt(x * y)

    def unbiased_cka(self) -> float:
        """CKA from the unbiased estimator of HSIC; may be slightly negative, and NaN where a network has collapsed."""
        self._enough(4)
        if any(self.collapsed()):
            return math.nan
        pairs = ((0, 1), (0, 0), (1, 1))
        if self._shift is None:
            grams = [gram - torch.diag(gram.diagonal()) for gram in self._grams()]
            both, x, y = (self._gram_hsic(grams[first], grams[second]) for first, second in pairs)
        else:
            both, x, y = (self._hsic(*pair) for pair in pairs)
        return both / math.sqrt(x * y) if min(x, y) > 0 else math.nan

    def collapsed(self) -> tuple[bool, bool]:
        """Whether all representations of the first, and of the second network are equal: they have no CKA."""
        self._enough(1)
        return self._equal(*self._products()[1:])

    def _equal(self, x: float, y: float) -> tuple[bool, bool]:
        first, second = (value <= 1e-24 * size**2 for value, size in zip((x, y), self._sizes(), strict=True))
        return first, second

    def _products(self) -> tuple[float, float, float]:
        """||X^T Y||_F^2, ||X^T X||_F^2 and ||Y^T Y||_F^2, centred."""
        if self._shift is None:
            k, h = self._grams()
            return float((k * h).sum()), float(k.square().sum()), float(h.square().sum())
        sx, sy, xx, yy, xy = self._sums[:5]
        centred = [m - torch.outer(a, b) / self.n for m, a, b in ((xy, sx, sy), (xx, sx, sx), (yy, sy, sy))]
        both, x, y = (float(m.square().sum()) for m in centred)
        return both, x, y

    def _held(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.cat(side) for side in zip(*self._rows, strict=True))
        return x, y

    def _grams(self) -> tuple[Tensor, Tensor]:
        """Centred inner products of the records that are held, [n, n] of either network."""
        k, h = (side @ side.mT for side in (values - values.mean(0) for values in self._held()))
        return k, h

    def _gram_hsic(self, k: Tensor, h: Tensor) -> float:
        """Song et al. 2012, eq. 5, on Gram matrices without their diagonal."""
        n = self.n
        whole = k.sum() * h.sum() / ((n - 1) * (n - 2))
        return float(((k * h).sum() + whole - 2 * (k.sum(0) @ h.sum(1)) / (n - 2)) / (n * (n - 3)))

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

    def _sizes(self) -> tuple[float, float]:
        """Squared sizes of the representations before centring: what rounding is measured against."""
        if self._shift is None:
            x, y = (float(side.square().sum()) for side in self._held())
        else:
            shifted = zip(self._shift, self._sums[5:7], strict=True)
            x, y = (float(shift.square().sum() * self.n + total) for shift, total in shifted)
        return x, y

    def _enough(self, least: int) -> None:
        if self.n < least:
            raise PalimpsestError(f"CKA needs at least {least} records, found {self.n}.")


def batch_mean_cka(x: Float[Tensor, "records d1"], y: Float[Tensor, "records d2"], size: int) -> float:
    """The plain mean of linear CKA over batches of `size` records in their order: higher than CKA over all of them.

    A last batch of fewer than 3 is left out: one record has no CKA, and two always have 1.
    """
    if len(x) != len(y):
        raise PalimpsestError(f"CKA compares the same records: {len(x)} of one network, {len(y)} of the other.")
    if size < 3:
        raise PalimpsestError(f"CKA needs batches of at least 3 records, found {size}.")
    batches = [pair for pair in zip(x.split(size), y.split(size), strict=True) if len(pair[0]) >= 3]
    if not batches:
        raise PalimpsestError(f"CKA needs at least 3 records, found {len(x)}.")
    return sum(linear_cka(*pair) for pair in batches) / len(batches)


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
