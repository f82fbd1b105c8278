"""Data attribution: what each training record adds to every output of a model, and so what a deletion would change.

A datamodel says that an output is a sum of contributions of the training records. Taking those of the forget set away
predicts the outputs of a model that never saw it. Two estimators fill the same table of contributions:

    regression  from the outputs of many models (a thousand), each trained on a random half of the data
    TRAK        from the gradients of a few models, of which a random projection is kept

    M       masks          [models, train]            1 where a model was trained on the record, else 0
    Y       outputs        [models, points, classes]  logits of those models at the points that are known
    B       contributions  [train, points, classes]   of a training record to each logit of each point
    m       multiplier                                what true changes are of predicted ones; 1 where B is exact

    f_c(x; theta) ~ b_0(x, c) + m sum_{i trained on} b_i(x, c)

    regression  M~ = M - mean of its column, Y~ = Y - its mean;  B = (M~^T M~ + r I)^-1 M~^T Y~
    TRAK        g_c(x) = P^T grad f_c(x), phi_i = P^T grad margin_i, p_i the probability of record i's label
                B = mean over the models trained on i of g_c(x)^T (Phi^T Phi + l I)^-1 phi_i (1 - p_i)

    slope       sum (Y - mean)(Y^ - mean) / sum (Y^ - mean)^2   at the records left out of each model, Y^ = sum of b_i

Choosing r by how well single models are predicted shrinks B, and many small errors add up in a group: removals come out
too small. `calibrated` sets m to the slope on models that were not used to fit, best with groups left out that are like
the one to be forgotten, in number and in kind (`ensemble.groups_like`): of random records the others make up for more
than of those of one class, and the slope is lower. TRAK's scores are in no unit at all, so there m is compulsory.

Sources: datamodels, Ilyas et al. 2022 (arXiv 2202.00622), with ridge in the place of LASSO; TRAK, Park et al. 2023
(arXiv 2303.14186), for every logit in the place of the margin, with l added, and with 1 - p_i of models that learned i
only (the mean over all, of which few did not, is theirs); Georgiev et al. 2025 (arXiv 2410.23232).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.labelled import class_count
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.predictions import classify, margins
from palimpsest.statistics.projection import DenseProjection, projected_gradients
from palimpsest.statistics.stored import read_tensors, write_tensors

FORMAT = "palimpsest-datamodel-1"


def names_of(records: Sequence[Record]) -> tuple[str, ...]:
    """A digest of each record by which a datamodel knows it again, in order."""
    return tuple(hashlib.sha256(record.key.encode()).hexdigest()[:32] for record in records)


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("|".join(sorted(names)).encode()).hexdigest()


def family(model: Model) -> str:
    """What models must share for one datamodel to be about all of them: architecture and shapes, not weights."""
    shapes = sorted((name, tuple(weight.shape)) for name, weight in model.network.state_dict().items())
    return f"{type(model.network).__name__} {hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datamodel:
    """Contributions of the records `train` to the outputs at `points`, both given as `names_of` them."""

    contributions: Float[Tensor, "train points classes"]
    train: tuple[str, ...]
    points: tuple[str, ...]
    family: str
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        shape, expected = list(self.contributions.shape), [len(self.train), len(self.points)]
        if len(shape) != 3 or shape[:2] != expected:
            raise PalimpsestError(f"contributions have shape {shape}, expected {expected} and the classes.")

    @property
    def data(self) -> str:
        """SHA-256 of the training data, whatever its order."""
        return _digest(self.train)

    def predict_removal(
        self, forget: Sequence[int] | Tensor, points: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "points classes"]:
        """What the outputs at these (or all) points lose without these training records; summed in float32."""
        rows = _places(forget, len(self.train), "forget set")
        columns = torch.arange(len(self.points)) if points is None else torch.as_tensor(points, dtype=torch.long)
        dtype = torch.promote_types(self.contributions.dtype, torch.float32)
        total = torch.zeros(len(columns), self.contributions.shape[2], dtype=dtype)
        for part in rows.split(256):  # of a file that is larger than memory, only these pages are read
            total += self.contributions[part[:, None], columns].sum(0, dtype=dtype)
        if not torch.isfinite(total).all():
            raise PalimpsestError("some contributions of the forget set are not finite.")
        return self.multiplier * total

    def forgotten(self, records: Sequence[Record]) -> Int[Tensor, " forget"]:
        """The training rows of these records; raises where they are more than there are, unknown, or named twice."""
        if len(records) > len(self.train):
            raise PalimpsestError(
                f"the forget set has {len(records)} records, more than the {len(self.train)} of the training data."
            )
        names = names_of(records)
        asked, held = Counter(names), Counter(self.train)
        for record, name in zip(records, names, strict=True):
            if asked[name] > held[name]:
                found = f"{held[name]} times" if held[name] else "not"
                raise PalimpsestError(
                    f'the forget record "{record.title}" ({asked[name]} times in the forget set) is {found} '
                    "in the training data."
                )
        return torch.tensor([row for row, name in enumerate(self.train) if name in asked], dtype=torch.long)

    def known(self, records: Sequence[Record]) -> Int[Tensor, " records"]:
        """Which points these records are; raises, naming the first, where one is not among them."""
        columns = {name: column for column, name in enumerate(self.points)}
        for record, name in zip(records, names := names_of(records), strict=True):
            if name not in columns:
                raise PalimpsestError(
                    f'the record "{record.title}" is not among the {len(columns)} points that the datamodel knows: it '
                    "can say nothing about other data. Estimate it with this record."
                )
        return torch.tensor([columns[name] for name in names], dtype=torch.long)

    def check(self, model: Model, train: Sequence[Record]) -> None:
        """Raises where the datamodel is not about models like this one, or not about this training data."""
        classes = self.contributions.shape[2]
        if classes != class_count(model):
            raise PalimpsestError(f"the datamodel has {classes} classes, the model {class_count(model)}.")
        if self.family != family(model):
            raise PalimpsestError(f"the datamodel is about {self.family}, but the model is {family(model)}.")
        given = _digest(names_of(train))
        if given != self.data:
            raise PalimpsestError(
                f"the datamodel was estimated on other training data: {len(self.train)} records with digest "
                f"{self.data[:12]}..., given are {len(train)} with {given[:12]}... Estimate it on these."
            )

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file, complete or not at all; contributions in float16, as the official code does."""
        halved = self.contributions.half()
        if not torch.isfinite(halved).all():
            raise PalimpsestError("some contributions are not finite, or above 65504: they do not fit into float16.")
        facts = {"format": FORMAT, "family": self.family, "multiplier": repr(self.multiplier), "data": self.data}
        named = {"train": " ".join(self.train), "points": " ".join(self.points)}
        return write_tensors(path, {"contributions": halved}, {**facts, **named})

    @classmethod
    def load(cls, path: str | Path) -> Datamodel:
        """The datamodel of a file, mapped into memory; raises where the file holds none, or was changed."""
        tensors, facts = read_tensors(path, FORMAT, "datamodel")
        found = cls(
            contributions=tensors["contributions"],
            train=tuple(facts["train"].split()),
            points=tuple(facts["points"].split()),
            family=facts["family"],
            multiplier=float(facts["multiplier"]),
        )
        if found.data != facts["data"]:
            raise PalimpsestError(f"{path} is damaged: its training records are not those of its digest.")
        return found


# --- the two estimators -----------------------------------------------------------------------------------------------


def regression(
    masks: Bool[Tensor, "models train"], outputs: Float[Tensor, "models points classes"], ridge: float = 10.0
) -> Float[Tensor, "train points classes"]:
    """B by ridge regression of the outputs on the masks, in closed form: one Cholesky factor for all outputs.

    `ridge` is r, to be small beside a quarter of the models: 10 of 1000 models keeps 0.96 of a removal.
    """
    if not ridge >= 0:
        raise PalimpsestError(f"ridge is {ridge}, expected at least 0.")
    _check(masks, outputs)
    given = masks.double()
    never = ((given == given[0]).all(0)).nonzero()
    if len(never):
        which = "every" if bool(given[0, never[0, 0]]) else "no"
        raise PalimpsestError(f"training record {int(never[0])} is in {which} subset: nothing can be said about it.")
    given = given - given.mean(0)
    flat = outputs.flatten(1).double()
    gram = given.T @ given
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or float(factor.diagonal().min()) < 1e-6 * float(factor.diagonal().max()):
        raise PalimpsestError(
            f"{len(masks)} masks do not tell {masks.shape[1]} records apart. Raise ridge ({ridge:g})."
        )
    return torch.cholesky_solve(given.T @ (flat - flat.mean(0)), factor).view(-1, *outputs.shape[1:])


def trak(
    models: Sequence[Model],
    masks: Bool[Tensor, "models train"],
    train: Sequence[Record],
    points: Sequence[Record],
    run: Run,
    *,
    size: int = 512,
    damping: float = 10.0,
    batch_size: int = 128,
) -> Float[Tensor, "train points classes"]:
    """B by TRAK over these models; in no unit, so `calibrated` must follow.

    `size` is the width of the projection; `damping` is l in shares of the mean of |phi|^2.
    """
    if not damping > 0:
        raise PalimpsestError(f"damping is {damping}, expected above 0.")
    if masks.shape != (len(models), len(train)) or not models:
        raise PalimpsestError(f"masks have shape {list(masks.shape)}, expected [{len(models)}, {len(train)}].")
    learned = masks.sum(0)
    if not learned.all():
        raise PalimpsestError(
            f"training record {int((learned == 0).nonzero()[0])} is in no subset: it has no gradient."
        )
    total = torch.zeros(len(train), len(points), class_count(models[0]))
    for number, (model, mask) in enumerate(zip(models, masks, strict=True)):
        project = functools.partial(
            projected_gradients,
            model,
            run=run,
            projection=DenseProjection(size, seed=run.seed + number),
            batch_size=batch_size,
        )
        unsure = 1 - classify(model, train, run).nll.neg().exp()
        phi = project(train, loss=margins).double()
        gram = phi.T @ phi
        gram.diagonal().add_(damping * float(gram.trace()) / len(train))
        lever = torch.linalg.solve(gram, (phi * (unsure * mask / learned)[:, None]).T)
        for c in range(total.shape[2]):
            total[..., c] += (project(points, loss=functools.partial(_logit, of=c)).double() @ lever).T.float()
    return total


def _logit(logits: Tensor, labels: Tensor, of: int) -> Tensor:
    return logits[:, of]


def slope(
    datamodel: Datamodel, masks: Bool[Tensor, "models train"], outputs: Float[Tensor, "models points classes"]
) -> float:
    """True change on predicted change, at each record in the models that were trained without it.

    The models must be others than the regression was fitted to. Raises where no such record is among the points.
    """
    _check(masks, outputs)
    b = datamodel.contributions
    if masks.shape[1] != len(b) or outputs.shape[1:] != b.shape[1:]:
        raise PalimpsestError(
            f"masks {list(masks.shape)} and outputs {list(outputs.shape)} do not fit contributions {list(b.shape)}."
        )
    rows = {name: row for row, name in enumerate(datamodel.train)}
    column = torch.tensor([rows.get(name, -1) for name in datamodel.points])
    out = ~masks[:, column] & (column >= 0)
    predicted = (masks.float() @ b.flatten(1).float()).view(outputs.shape)
    true, predicted = (x - x.mean(0) for x in (outputs.float(), predicted))
    if not out.any() or not bool(predicted[out].any()):
        raise PalimpsestError("the calibration has nothing to compare: no known point is left out, or none changes.")
    return float((true[out] * predicted[out]).sum() / predicted[out].square().sum())


def calibrated(
    datamodel: Datamodel, masks: Bool[Tensor, "models train"], outputs: Float[Tensor, "models points classes"]
) -> Datamodel:
    """The datamodel with the slope on these models as its multiplier."""
    return dataclasses.replace(datamodel, multiplier=slope(datamodel, masks, outputs))


def _check(masks: Tensor, outputs: Tensor) -> None:
    if masks.dtype != torch.bool or masks.ndim != 2 or outputs.ndim != 3 or len(masks) != len(outputs):
        raise PalimpsestError(
            f"masks are {masks.dtype} {list(masks.shape)} and outputs {list(outputs.shape)}, expected booleans "
            "[models, train] and numbers [models, points, classes] of as many models."
        )
    if len(masks) < 2:
        raise PalimpsestError("a datamodel needs at least two models.")
    if outputs.shape[2] < 2:
        raise PalimpsestError("the outputs have one class, expected two or more.")
    if not torch.isfinite(outputs).all():
        raise PalimpsestError("some outputs are not finite.")


def _places(chosen: Sequence[int] | Tensor, count: int, what: str) -> Int[Tensor, " chosen"]:
    places = torch.as_tensor(chosen, dtype=torch.long)
    if len(places) and (int(places.min()) < 0 or int(places.max()) >= count):
        raise PalimpsestError(f"the {what} names a record outside 0 to {count - 1}.")
    if len(places.unique()) < len(places):
        raise PalimpsestError(f"the {what} names a record twice.")
    return places
