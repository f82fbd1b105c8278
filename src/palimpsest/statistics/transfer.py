"""How well frozen features tell classes apart that the network need not know: nearest neighbours, a linear probe.

A part of the records teaches, the rest is asked. Both say what is in the features whatever the network's own last
layer makes of them: neighbours what lies together, the probe what a new last layer could read out.

    x      features    [records, width]
    c      class       [records]         any whole numbers
    s_ij   similarity  cosine of x_i and x_j; 0 where one of them is zero
    vote of class a on record i: the k most similar teachers of class a; a tie goes to the smaller sum of 1 - s_ij,
    then to the smaller class
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import PalimpsestError

CHUNK = 1024
"""Records asked at once: memory, not result."""


def split(records: int, share: float = 0.8, seed: int = 2) -> tuple[Int[Tensor, " taught"], Int[Tensor, " asked"]]:
    """Which records teach and which are asked, at random; the seed is that of the official code of UUEF."""
    order = torch.randperm(records, generator=torch.Generator().manual_seed(seed))
    taught = int(share * records)
    return order[:taught], order[taught:]


def few(labels: Int[Tensor, " taught"], k: int) -> list[int]:
    """The classes with fewer than k teachers: k neighbours of a record cannot all be of its own class."""
    classes, counts = labels.unique(return_counts=True)
    return classes[counts < k].tolist()


def neighbour_labels(
    taught: Float[Tensor, "taught width"],
    labels: Int[Tensor, " taught"],
    asked: Float[Tensor, "asked width"],
    k: int = 5,
) -> Int[Tensor, " asked"]:
    """The class that the k nearest teachers of each record vote for."""
    if not 1 <= k <= len(taught):
        raise PalimpsestError(f"k is {k}, expected 1 to {len(taught)}, the number of records that teach.")
    classes, places = labels.unique(return_inverse=True)
    teachers = _unit(taught)
    found = []
    for part in asked.split(CHUNK):
        nearest = (_unit(part) @ teachers.mT).topk(k)
        votes, distance = (torch.zeros(len(part), len(classes), dtype=torch.float64) for _ in range(2))
        voted = places[nearest.indices]
        votes.scatter_add_(1, voted, torch.ones_like(nearest.values))
        distance.scatter_add_(1, voted, 1 - nearest.values)
        ranked = votes - distance / (2 * k + 1)  # no sum of k distances reaches 2k + 1, so it decides ties alone
        found.append(classes[torch.from_numpy(ranked.numpy().argmax(1))])  # numpy's is sure to be the first
    return torch.cat(found)


def probe_labels(
    taught: Float[Tensor, "taught width"], labels: Int[Tensor, " taught"], asked: Float[Tensor, "asked width"]
) -> Int[Tensor, " asked"]:
    """The class that a logistic regression on standardised features, fitted to the teachers, gives to each record."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(labels.unique()) < 2:
        raise PalimpsestError("a linear probe needs teachers of at least two classes.")
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    found = reader.fit(taught.double().numpy(), labels.numpy()).predict(asked.double().numpy())
    return torch.from_numpy(np.asarray(found))


def class_means(
    features: Float[Tensor, "records width"], labels: Int[Tensor, " records"]
) -> tuple[list[int], Float[Tensor, "classes width"]]:
    """The classes in order, and the mean of the features of each."""
    classes, places = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), features.shape[1], dtype=torch.float64).index_add_(0, places, features.double())
    return classes.tolist(), sums / torch.bincount(places)[:, None]


def ranked_by_similarity(
    known: Float[Tensor, "classes width"], others: Float[Tensor, "others width"], names: Sequence[int] | None = None
) -> list[int]:
    """The known classes, closest first: by cosine similarity to whichever of the others is nearest.

    A row is a class: the mean of its features, or an embedding of its name.
    """
    if known.shape[1] != others.shape[1]:
        raise PalimpsestError(f"classes of width {known.shape[1]} cannot be compared with those of {others.shape[1]}.")
    nearest = (_unit(known) @ _unit(others).mT).amax(1)
    order = nearest.argsort(descending=True, stable=True).tolist()
    return order if names is None else [names[place] for place in order]


def _unit(rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    return F.normalize(rows.double(), dim=1)
