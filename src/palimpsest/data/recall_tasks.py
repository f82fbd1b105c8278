"""Tasks that can only be solved by remembering what stood earlier in the sequence: seeded, of any length.

    multi-query recall   k1 v1 k2 v2 ... (filler) k v k v ...    after a key stands the value that it had before
    copying              s1 s2 ... sn (filler) go s1 s2 ... sn   all of it once more
    passkey              filler text with a number in it, and the question for that number
    needle               filler text with facts in it, and the question for one of them

The first two are token sequences for models trained on them; only tokens that memory decides are scored. The others are
records with a prompt and an answer, for any language model. All state how far back the answer stood, so that recall can
be drawn against distance.

Sources: multi-query recall, Arora et al. 2023 (arXiv 2312.04927); copying, Jelassi et al. 2024 (arXiv 2402.01032);
passkey, Mohtashami and Jaggi 2023 (arXiv 2305.16300); needles, Hsieh et al. 2024 (RULER, arXiv 2404.06654).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

FILL, GO = 0, 1
"""The token that means nothing, and the one after which the copy begins."""


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """Sequences of one length; `distance` is how many tokens back the answer stood, 0 where nothing is scored."""

    tokens: Int[Tensor, "n t"]
    distance: Int[Tensor, "n t"]
    vocabulary: int

    @cached_property
    def scored(self) -> Bool[Tensor, "n t"]:
        """The tokens that memory decides."""
        return self.distance > 0

    @cached_property
    def first(self) -> int:
        """The first scored position of any sequence."""
        return int(self.scored.any(0).nonzero()[0])

    def sequences(self) -> list[Encoded]:
        """For the training loop; all tokens from `first` on are its targets, `loss` takes those that are scored."""
        return [Encoded(tuple(row), self.first, index) for index, row in enumerate(self.tokens.tolist())]

    def loss(self, view: Any) -> Float[Tensor, ""]:
        """Mean negative log-likelihood of the scored tokens: an objective on a role made of `sequences`."""
        wanted = self.scored[view.index.cpu(), self.first :].to(view.log_probs.device)
        nll = -view.log_probs.view(wanted.shape) * wanted
        return view.mean_examples(nll.sum(1) / wanted.sum(1))

    @torch.no_grad()
    def hits(self, network: Any, batch: int = 64) -> Bool[np.ndarray, " scored"]:
        """Which of the scored tokens the network puts first, in order of sequences and positions."""
        found = []
        training = network.training
        network.eval()
        for rows, wanted in zip(self.tokens.split(batch), self.scored.split(batch), strict=True):
            guess = network(input_ids=rows.to(next(network.parameters()).device)).logits[:, :-1].argmax(-1).cpu()
            found.append((guess == rows[:, 1:])[wanted[:, 1:]])
        network.train(training)
        return torch.cat(found).numpy()

    def by_distance(self, hits: Bool[np.ndarray, " scored"], bins: int = 8) -> list[tuple[float, float]]:
        """Mean distance and share of hits in equally filled bins of distance."""
        distance = self.distance[self.scored].numpy()
        order = np.argsort(distance, kind="stable")
        return [(float(distance[part].mean()), float(hits[part].mean())) for part in np.array_split(order, bins)]


def multi_query_recall(
    count: int,
    pairs: int,
    *,
    keys: int = 32,
    values: int = 32,
    queries: int | None = None,
    filler: int = 0,
    seed: int = 0,
) -> RecallTask:
    """Pairs of distinct keys and any values, then queries: keys again, in another order, each with its value.

    Tokens: 0 filler, then the keys, then the values. `queries` None asks for every pair once. The filler tokens stand
    between pairs and queries. Raises where there are fewer keys than pairs, or pairs than queries.
    """
    queries = pairs if queries is None else queries
    if not 1 <= pairs <= keys:
        raise PalimpsestError(f"pairs is {pairs} of {keys} keys, expected 1 to the number of keys.")
    if not 1 <= queries <= pairs:
        raise PalimpsestError(f"queries is {queries} of {pairs} pairs, expected 1 to the number of pairs.")
    rng = np.random.default_rng([seed, count, pairs])
    key = rng.permuted(np.tile(np.arange(keys), (count, 1)), axis=1)[:, :pairs] + 2
    value = rng.integers(values, size=(count, pairs)) + 2 + keys
    asked = rng.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)[:, :queries]
    start, length = 2 * pairs + filler, 2 * (pairs + queries) + filler
    tokens, distance = np.full((count, length), FILL), np.zeros((count, length), dtype=np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = key, value
    tokens[:, start::2], tokens[:, start + 1 :: 2] = (np.take_along_axis(x, asked, 1) for x in (key, value))
    distance[:, start + 1 :: 2] = np.arange(start + 1, length, 2) - (2 * asked + 1)
    return RecallTask(torch.from_numpy(tokens), torch.from_numpy(distance), 2 + keys + values)


def copying(count: int, length: int, *, symbols: int = 32, filler: int = 0, seed: int = 0) -> RecallTask:
    """Random symbols, filler tokens, the token 1, and the symbols once more; the copy is scored."""
    if length < 1 or symbols < 1:
        raise PalimpsestError(f"length is {length} and symbols is {symbols}, expected at least 1 of each.")
    rng = np.random.default_rng([seed, count, length])
    said = rng.integers(symbols, size=(count, length)) + 2
    between = np.full((count, filler + 1), FILL)
    between[:, -1] = GO
    tokens = np.concatenate([said, between, said], axis=1)
    distance = np.zeros_like(tokens)
    distance[:, -length:] = length + filler + 1
    return RecallTask(torch.from_numpy(tokens), torch.from_numpy(distance), 2 + symbols)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A question about something said in a long text; `depth` is where: 0 at its beginning, 1 at its end."""

    record: Record
    depth: float
    words: int


FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
PLACES = (
    "Aldora",
    "Brinmouth",
    "Corvale",
    "Dunsea",
    "Elmstead",
    "Farrow",
    "Gorsehill",
    "Harwick",
    "Inverlow",
    "Jarrow",
)


def passkey(count: int, sentences: int, *, seed: int = 0) -> list[Hidden]:
    """A five-digit number among `sentences` sentences that say nothing, at depths spread evenly over the records."""

    def make(rng: np.random.Generator) -> tuple[list[str], str, str]:
        number = str(rng.integers(10_000, 100_000))
        return [f"The pass key is {number}. Remember it."], "What is the pass key?", number

    return _hide(count, sentences, FILLER, make, seed)


def needle(
    count: int, sentences: int, *, needles: int = 1, haystack: Sequence[str] = FILLER, seed: int = 0
) -> list[Hidden]:
    """Towns with their numbers among sentences of the haystack, and the question for the first of them.

    The other needles distract: they stand at random places. Raises where there are more than ten.
    """
    if not 1 <= needles <= len(PLACES):
        raise PalimpsestError(f"needles is {needles}, expected 1 to {len(PLACES)}.")

    def make(rng: np.random.Generator) -> tuple[list[str], str, str]:
        towns = rng.permutation(len(PLACES))[:needles]
        numbers = rng.choice(np.arange(1000, 10_000), size=needles, replace=False)
        said = [f"The special number of {PLACES[t]} is {n}." for t, n in zip(towns, numbers, strict=True)]
        return said, f"What is the special number of {PLACES[towns[0]]}?", str(numbers[0])

    return _hide(count, sentences, haystack, make, seed)


def _hide(
    count: int,
    sentences: int,
    haystack: Sequence[str],
    make: Callable[[np.random.Generator], tuple[list[str], str, str]],
    seed: int,
) -> list[Hidden]:
    if not haystack:
        raise PalimpsestError("the haystack has no sentence.")
    rng = np.random.default_rng([seed, count, sentences])
    found = []
    for place in range(count):
        said, question, answer = make(rng)
        text = [haystack[i % len(haystack)] for i in range(sentences)]
        for other in said[1:]:
            text.insert(int(rng.integers(len(text) + 1)), other)
        depth = place / max(1, count - 1)
        text.insert(round(depth * len(text)), said[0])
        prompt = " ".join([*text, question])
        found.append(Hidden(Record(prompt=prompt, answer=answer), depth, len(prompt.split())))
    return found
