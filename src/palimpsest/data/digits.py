"""Handwritten digits to remember and to forget: 1797 images of 8 x 8 pixels that come with scikit-learn, offline.

A part of the training images is chosen to be forgotten: whole classes, a share of some classes, images that lie close
together (a group that has something in common), or some of all; with `labels="wrong"` these were learned with another
digit's label, so that there is something about them which nothing else in the data supports.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError

CLASSES = 10
SIDE = 8
Pick = Literal["random", "neighbours"]
Labels = Literal["true", "wrong"]


def digits(
    seed: int = 0,
    classes: Sequence[int] = (0,),
    share: float = 1.0,
    *,
    pick: Pick = "random",
    labels: Labels = "true",
    train_share: float = 0.7,
) -> Roles:
    """Roles over the digits, with pixels in [0, 1] as arrays [1, 8, 8]; train and test split class by class.

    To be forgotten is `share` of the training images of `classes` (of all, where none is named): drawn at random, or
    the nearest neighbours of one drawn at random. `train` = `forget` and `retain`, shuffled; `holdout` are test images
    of the same classes as the forget set; `test` those of the classes of which something is retained. The two share
    images where a class is forgotten in part.
    """
    unknown = [c for c in classes if not 0 <= c < CLASSES]
    if unknown:
        raise PalimpsestError(f"there is no digit {unknown[0]}; classes are 0 to {CLASSES - 1}.")
    for name, value in (("share", share), ("train_share", train_share)):
        if not 0 < value <= 1 or (name == "train_share" and value == 1):
            raise PalimpsestError(
                f"{name} is {value:g}, expected above 0 and {'below' if name != 'share' else 'at most'} 1."
            )
    pixels, truth = _images()
    rng = np.random.default_rng([seed, 1797])
    train, test = _split(truth, train_share, rng)
    pool = train[np.isin(truth[train], classes)] if len(classes) else train
    chosen = _chosen(pixels, pool, max(1, round(share * len(pool))), pick, rng)
    if len(chosen) == len(train):
        raise PalimpsestError("nothing is left to retain: name fewer classes, or a smaller share.")
    given = truth.copy()
    if labels == "wrong":
        given[chosen] = (truth[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
    retained = np.setdiff1d(train, chosen)
    like_forget = test[np.isin(truth[test], truth[chosen])]
    like_retain = test[np.isin(truth[test], truth[retained])]

    def records(rows: Int[np.ndarray, " images"]) -> list[Record]:
        return [Record(image=pixels[i], label=int(given[i]), subject=f"digit {truth[i]}") for i in rows]

    return Roles(
        train=records(train),
        forget=records(train[np.isin(train, chosen)]),
        retain=records(train[np.isin(train, retained)]),
        holdout=records(like_forget),
        test=records(like_retain),
    )


@functools.cache
def _images() -> tuple[Float[np.ndarray, "images 1 8 8"], Int[np.ndarray, " images"]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images[:, None] / 16).astype(np.float32)
    pixels.setflags(write=False)  # shared by all records
    return pixels, found.target


def _split(
    truth: Int[np.ndarray, " images"], train_share: float, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Shuffled rows for training and testing, the same share of every class."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for c in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(truth == c))
        for part, piece in zip(parts, np.split(rows, [round(train_share * len(rows))]), strict=True):
            part.append(piece)
    train, test = (rng.permutation(np.concatenate(part)) for part in parts)
    return train, test


def _chosen(
    pixels: Float[np.ndarray, "images 1 8 8"],
    pool: Int[np.ndarray, " pool"],
    count: int,
    pick: Pick,
    rng: np.random.Generator,
) -> Int[np.ndarray, " chosen"]:
    if pick == "random":
        return rng.choice(pool, count, replace=False)
    centre = pixels[rng.choice(pool)]
    distance = np.square(pixels[pool] - centre).sum(axis=(1, 2, 3))
    return pool[np.argsort(distance, kind="stable")[:count]]
