"""Search: by meaning, by words, or by both, with filters, a second opinion, diversity, and the reasons for every hit.

fused score = sum over both rankings of 1 / (60 + rank)        reciprocal rank fusion (Cormack et al. 2009)
next hit    = argmax (1 - d) relevance - d max cosine to those before it
                                                               maximal marginal relevance (Carbonell, Goldstein 1998)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.recall import reading
from palimpsest.recall.filters import Test, compiled
from palimpsest.recall.memories import Hit, Sight, check_vector, encodable
from palimpsest.recall.opening import Opened

if TYPE_CHECKING:
    from palimpsest.recall.items import Items

Ranking = Literal["dense", "words", "fused"]
FUSION = 60
"""The constant of reciprocal rank fusion, from its paper."""
DEEP = 100
"""How far down each of two rankings is read before they are fused."""
POOL = 4
"""Candidates for each wanted hit where not all of them will be shown."""
Reranker = Callable[[str, list[str]], Sequence[float]]
"""A number for each text, higher where it answers the query better, as a cross-encoder gives for the two as a pair."""
Weights = Callable[[Any, Any], Any]
"""Salience of chunks from their turns and last retrievals."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is looked for: a text or its vector, how many, a filter on metadata, and by what they are ranked.

    `diversity` from 0 to 1 trades nearness for being unlike the other hits; `reranker` orders the candidates anew.
    """

    query: str
    vector: Any
    limit: int
    where: Mapping[str, Any] | None
    ranking: Ranking
    diversity: float = 0.0
    reranker: Reranker | None = None

    @property
    def wanted(self) -> int:
        """How many candidates are needed."""
        return self.limit * (POOL if self.diversity or self.reranker else 1)


def find(opened: Opened, asked: Question, sight: Sight, weights: Weights) -> list[Hit]:
    """The best hits in sight; a filter makes it read further down until enough pass."""
    if not asked.query.strip() and asked.vector is None:
        raise PalimpsestError("the query is empty.")
    encodable(asked.query, "the query")
    if isinstance(asked.limit, bool) or not isinstance(asked.limit, int) or asked.limit < 1:
        raise PalimpsestError(f"limit is {asked.limit!r}, expected a whole number of at least 1.")
    if asked.ranking not in get_args(Ranking):
        raise PalimpsestError(f"ranking is {asked.ranking!r}. {nearest(str(asked.ranking), get_args(Ranking))}")
    if not 0 <= asked.diversity <= 1:
        raise PalimpsestError(f"diversity is {asked.diversity}, expected from 0 to 1.")
    test = compiled(asked.where) if asked.where is not None else None
    vector = opened.encode([asked.query])[0] if asked.vector is None else check_vector(asked.vector, opened.width)
    depth = asked.wanted if test is None else 4 * asked.wanted
    while True:
        ranked = _ranked(opened, asked, vector, sight, depth)
        hits = _hits(opened, ranked, vector, test, weights)
        if len(hits) >= asked.wanted or len(ranked) < depth:
            return _selected(opened, asked, hits[: asked.wanted])
        depth *= 4


def diverse(
    relevance: Float[np.ndarray, " hits"], vectors: Float[np.ndarray, "hits width"], limit: int, diversity: float
) -> list[int]:
    """Positions by maximal marginal relevance, best first: Carbonell and Goldstein 1998."""
    likeness = vectors @ vectors.T
    nearest = np.full(len(relevance), -1.0)
    chosen: list[int] = []
    for _ in range(min(limit, len(relevance))):
        value = (1 - diversity) * relevance - diversity * nearest
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
        nearest = np.maximum(nearest, likeness[chosen[-1]])
    return chosen


def _selected(opened: Opened, asked: Question, hits: list[Hit]) -> list[Hit]:
    """The hits to show out of the candidates."""
    if asked.reranker is not None and hits:
        scores = [float(score) for score in asked.reranker(asked.query, [hit.text for hit in hits])]
        if len(scores) != len(hits):
            raise PalimpsestError(f"the reranker gave {len(scores)} scores for {len(hits)} texts.")
        order = sorted(range(len(hits)), key=lambda i: -scores[i])
        hits = [dataclasses.replace(hits[i], score=scores[i], why={**hits[i].why, "rerank": scores[i]}) for i in order]
    if not asked.diversity or not hits:
        return hits[: asked.limit]
    relevance = np.array([hit.score for hit in hits])
    if asked.reranker is not None or asked.ranking != "dense":  # scores of another scale than cosines
        relevance = (relevance - relevance.min()) / max(np.ptp(relevance), 1e-12)
    vectors = opened.engine.vectors([hit.number for hit in hits])
    return [hits[i] for i in diverse(relevance, vectors, asked.limit, asked.diversity)]


def fused(rankings: Mapping[str, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Numbers by the sum of 1 / (60 + rank) over the rankings, best first; of equal ones the lower number."""
    scores: dict[int, float] = {}
    for ranking in rankings.values():
        for rank, (number, _) in enumerate(ranking, start=1):
            scores[number] = scores.get(number, 0.0) + 1 / (FUSION + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


def _ranked(
    opened: Opened, asked: Question, vector: Any, sight: Sight, depth: int
) -> list[tuple[int, float, dict[str, float]]]:
    """Number, score, and the parts of the score."""
    engine = opened.engine
    far = max(depth, DEEP) if asked.ranking == "fused" else depth
    found = {}
    if asked.ranking != "words":
        found["cosine"] = engine.nearest(vector, far, sight)
    if asked.ranking != "dense":
        found["words"] = engine.matching(asked.query, far, sight)
    best = (fused(found) if len(found) > 1 else next(iter(found.values())))[:depth]
    parts = {name: dict(ranking) for name, ranking in found.items()}
    return [(n, score, {name: own[n] for name, own in parts.items() if n in own}) for n, score in best]


def _hits(
    opened: Opened, ranked: list[tuple[int, float, dict[str, float]]], vector: Any, test: Test | None, weights: Weights
) -> list[Hit]:
    chunks = reading.chunks(opened.engine, [number for number, *_ in ranked])
    memories = reading.memories(opened.engine, [head for head, *_ in chunks.values()])
    hits = []
    for number, score, parts in ranked:
        if number not in chunks or chunks[number][0] not in memories:
            continue  # forgotten by another process since the ranking
        head, text, turn, last = chunks[number]
        memory = memories[head]
        if test is not None and not test(memory.metadata):
            continue
        salience = weights(np.array([turn]), np.array([last]))[0]
        why = {"score": score, **parts, "salience": float(salience), "turn": float(turn)}
        hits.append(Hit(memory=memory, number=number, text=text, score=score, why=why))
    return hits


def chosen(
    items: Items,
    *,
    where: Mapping[str, Any] | None = None,
    containing: str | None = None,
    like: str | None = None,
    alike: float = 0.95,
    expired: bool = False,
    faded: bool = False,
) -> dict[str, str]:
    """Identities of all memories, current or not, that a deletion request means, each with its reason.

    Those that satisfy the filter, hold a text (in any case), have a cosine of at least `alike` to the memory `like`,
    have expired, or have faded: the union of what is asked for.
    """
    if not (where is not None or containing or like or expired or faded):
        raise PalimpsestError("nothing was named to forget: give a filter, a text, or a memory.")
    if where is not None and not where:
        raise PalimpsestError("the filter is empty, which everything satisfies: name a field.")
    if not 0 < alike <= 1:
        raise PalimpsestError(f"alike is {alike}, expected above 0 and at most 1.")
    test = compiled(where) if where is not None else None
    found: dict[str, str] = {}
    now = time.time()
    for item in reading.listing(items.opened.engine, items.sight("all")):
        if containing and containing.casefold() in item.text.casefold():
            found[item.identity] = f"holds {len(containing)} characters that were named"
        elif test is not None and test(item.metadata):
            found[item.identity] = "satisfies the filter"
        elif expired and item.expires is not None and item.expires <= now:
            found[item.identity] = "has expired"
        elif faded and item.faded:
            found[item.identity] = "has faded"
    if like:
        engine = items.opened.engine
        for vector in engine.vectors(items.numbers([items.get(like).identity])):
            near = dict(engine.alike(vector, alike, items.sight("all")))
            heads = {number: head for number, (head, *_) in reading.chunks(engine, list(near)).items()}
            for number, cosine in near.items():
                if number in heads:  # not forgotten by another process since
                    found.setdefault(str(heads[number]), f"cosine {cosine:.2f} to memory {like}")
    return found
