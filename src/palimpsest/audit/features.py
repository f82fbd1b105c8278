"""What the features of several models show on each set: likeness, transfer, and right answers beside them.

Every model goes through the records once. Sets are the roles that the logits are scored on, and downstream data: roles
whose name begins with `downstream`, with classes that the models need not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from palimpsest.audit.answers import answers
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likeness import Kept, Pair, classes_of, compared, unlabelled
from palimpsest.statistics.representations import batch_mean_cka
from palimpsest.statistics.transfer import few, neighbour_labels, probe_labels, split
from palimpsest.system import setting, settings

LOGIT_ROLES = ("forget", "retain", "holdout", "test")
DOWNSTREAM = "downstream"
FEWEST = 4
"""Records that the unbiased estimate of CKA needs."""
LEAST = 200
"""Retain records among which neighbours are looked for, however small their share."""


@settings
class Transfer:
    """How frozen features are asked for classes: by their nearest neighbours and by a linear probe."""

    features: Literal["penultimate", "logits"] = setting(
        default="penultimate", origin="ours; official code: logits", help="what neighbours and linear probe see"
    )
    k: int = setting(default=5, at_least=1, origin="paper", help="neighbours that vote")
    taught: float = setting(default=0.8, above=0, below=1, origin="official code", help="share of a set that teaches")
    split_seed: int = setting(default=2, at_least=0, origin="official code", help="seed of that split")
    retain_share: float = setting(
        default=0.1,
        above=0,
        at_most=1,
        origin="official code",
        help="part of retain in which neighbours are looked for",
    )

    def split(self, records: int) -> tuple[Int[Tensor, " taught"], Int[Tensor, " asked"]]:
        """Which of so many records teach, and which are asked."""
        return split(records, self.taught, self.split_seed)

    def problem(self, classes: Int[Tensor, " records"] | None) -> str:
        """Why records of these classes cannot be asked; empty where they can."""
        if classes is None:
            return "not every record has a label or a subject"
        taught, asked = self.split(len(classes))
        if len(taught) < self.k or not len(asked):
            return f"{len(taught)} records teach and {len(asked)} are asked, with {self.k} neighbours that vote"
        return "" if len(classes[taught].unique()) > 1 else "the records that teach are of one class"


@dataclasses.dataclass(frozen=True)
class Part:
    """One set of records. Those at `places` are asked for their `classes`; none may be."""

    name: str
    records: list[Record]
    places: Int[Tensor, " chosen"]
    classes: Int[Tensor, " chosen"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one set shows: CKA by pair of models and layer, unbiased for the features, and networks that collapsed.

    By model and record: `logit`, the share of right labels or tokens; `knn` and `linear`, whether the class is right.
    """

    cka: dict[Pair, dict[str, float]]
    unbiased: dict[Pair, float]
    collapsed: set[str]
    records: int
    logit: dict[str, np.ndarray]
    knn: dict[str, np.ndarray]
    linear: dict[str, np.ndarray]


def parts_of(data: Roles, transfer: Transfer, by: str, remarks: list[str]) -> list[Part]:
    """The sets; raises where one is too small, or a downstream one cannot be asked. Other losses are remarked."""
    named = [name for name in data if name.startswith(DOWNSTREAM) and not name.endswith("_probe")]
    if not named:
        remarks.append("no downstream set was given: AGR is made of CKA alone")
    parts = []
    for name in (*LOGIT_ROLES, *named):
        if name in ("holdout", "test") and name not in data:
            remarks.append(f"no {name} set was given: its accuracy is not in AGL")
            continue
        records = data.probe(name) or data.require(name, by=by)
        if len(records) < FEWEST:
            raise PalimpsestError(f"the {name} set has {len(records)} records; CKA needs at least {FEWEST}.")
        asked = name not in ("holdout", "test")
        places, classes = _asked(name, records, transfer, name in named, remarks) if asked else (torch.arange(0),) * 2
        parts.append(Part(name, unlabelled(records) if name in named else records, places, classes))
    return parts


def _asked(
    name: str, records: list[Record], transfer: Transfer, needed: bool, remarks: list[str]
) -> tuple[Int[Tensor, " chosen"], Int[Tensor, " chosen"]]:
    """The places of the records that are asked, and their classes."""
    places = torch.arange(len(records))
    if name == "retain":
        count = max(round(transfer.retain_share * len(records)), min(len(records), LEAST))
        generator = torch.Generator().manual_seed(transfer.split_seed)
        places = torch.randperm(len(records), generator=generator)[:count].sort().values
    every = classes_of(records)
    classes = None if every is None else every[places]
    problem = transfer.problem(classes)
    if problem and needed:
        raise PalimpsestError(f"the {name} set cannot be asked for classes: {problem}.")
    if problem or classes is None:
        remarks.append(f"the {name} set is not asked for classes: {problem}")
        return torch.arange(0), torch.arange(0)
    if thin := few(classes[transfer.split(len(classes))[0]], transfer.k):
        remarks.append(f"{len(thin)} classes of the {name} set have fewer than {transfer.k} records that teach")
    return places, classes


def look(
    models: Mapping[str, Model],
    pairs: Sequence[Pair],
    part: Part,
    run: Run,
    transfer: Transfer,
    *,
    scored: Sequence[str],
    batch_mean: int | None = None,
    batch_size: int = 32,
) -> Seen:
    """What a set shows of the pairs, and of the models that are scored by themselves."""
    by: Kept = "logits" if transfer.features == "logits" else "features"
    chosen = torch.full((len(part.records),), batch_mean is not None)
    chosen[part.places] = True
    found = compared(
        models,
        pairs,
        part.records,
        run,
        all_layers=part.name in ("forget", "retain"),
        kept=chosen,
        keep=(by, "features") if batch_mean and by != "features" else (by,),
        batch_size=batch_size,
    )
    cka = {pair: {layer: sums.cka() for layer, sums in layers.items()} for pair, layers in found.products.items()}
    if batch_mean:
        for first, second in pairs:
            vectors = found.features[first, "features"], found.features[second, "features"]
            cka[first, second]["features"] = batch_mean_cka(*vectors, batch_mean)
    last = {pair: layers["features"] for pair, layers in found.products.items()}
    flat = {name for pair, sums in last.items() for name, yes in zip(pair, sums.collapsed(), strict=True) if yes}
    seen = Seen(cka, {pair: sums.unbiased_cka() for pair, sums in last.items()}, flat, len(part.records), {}, {}, {})
    rows = part.places if batch_mean else torch.arange(len(part.places))
    taught, asked = transfer.split(len(rows))
    for name in scored:
        if part.name in LOGIT_ROLES:
            seen.logit[name] = _right(models[name], part.records, found.labels.get(name), run)
        if len(rows):
            x, y = found.features[name, by][rows], part.classes
            voted = neighbour_labels(x[taught], y[taught], x[asked], transfer.k)
            read = probe_labels(x[taught], y[taught], x[asked])
            seen.knn[name], seen.linear[name] = ((own == y[asked]).double().numpy() for own in (voted, read))
    return seen


def _right(model: Model, records: list[Record], labels: Int[Tensor, " records"] | None, run: Run) -> np.ndarray:
    """The share of right labels of each record: one of a classifier, all tokens of the answer of a language model."""
    if kind_of(model) == "classifier":
        assert labels is not None
        return np.array([float(record.label == label) for record, label in zip(records, labels.tolist(), strict=True)])
    return np.array([answer.correct.mean() for answer in answers(model, records, run)])
