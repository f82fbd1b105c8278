"""Summarisers of a conversation: `summarise(summary so far, what was said now) -> new summary`, within a token cap.

The default picks sentences, so it needs no language model and every word of a summary can be traced to what was said:

    x_s     [sentences width]   unit vectors of the sentences of the summary so far and of the turn
    c       [width]             their mean
    choose argmax_s  x_s c - max over the chosen t of x_s x_t       until the cap is reached

Source of the scheme: Ahn 2025 (arXiv 2504.16754) has a trained dialogue summariser here; any callable will do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from palimpsest.errors import PalimpsestError
from palimpsest.recall.chunks import Lengths, sentences
from palimpsest.run import Run

if TYPE_CHECKING:
    from palimpsest.models.model import Model


class Summariser(Protocol):
    """A callable with a mark that says whether its summaries are made of sentences of its input."""

    extractive: bool

    def __call__(self, summary: str, said: str) -> str:
        """The summary of the conversation after what was said."""


class ExtractiveSummariser:
    """The most central sentences that do not repeat each other, in the order in which they stand, a line each."""

    extractive = True

    def __init__(self, encoder: Any, lengths: Lengths, limit: int = 60) -> None:
        self.encoder, self.lengths, self.limit = encoder, lengths, limit
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, summary: str, said: str) -> str:
        """At most `limit` tokens of both; the beginning of the most central sentence where none fits."""
        found = list(dict.fromkeys(s.strip() for s in (*sentences(summary), *sentences(said)) if s.strip()))
        if not found:
            raise PalimpsestError("there is nothing to summarise: both texts are empty.")
        sizes = np.array(self.lengths(found))
        if sizes.sum() <= self.limit:
            return "\n".join(found)
        vectors = self._encoded(found)
        central, alike = vectors @ vectors.mean(axis=0), vectors @ vectors.T
        chosen: list[int] = []
        left = self.limit
        while len(fitting := np.setdiff1d(np.flatnonzero(sizes <= left), chosen)):
            repeats = alike[fitting][:, chosen].max(axis=1) if chosen else 0.0
            best = int(fitting[np.argmax((central[fitting] - repeats).round(6))])  # rounding must not choose
            chosen.append(best)
            left -= int(sizes[best])
        if not chosen:
            return self._beginning(found[int(np.argmax(central.round(6)))])
        return "\n".join(found[i] for i in sorted(chosen))

    def _encoded(self, found: list[str]) -> np.ndarray:
        """Unit vectors; those of the last call, which gave the summary so far, are not computed again."""
        if new := [sentence for sentence in found if sentence not in self._known]:
            made = np.asarray(self.encoder.encode(new), dtype=np.float64)
            self._known |= dict(zip(new, made, strict=True))
        self._known = {sentence: self._known[sentence] for sentence in found}
        return np.stack(list(self._known.values()))

    def _beginning(self, sentence: str) -> str:
        words = re.findall(r"\S+\s*", sentence)
        ends = np.cumsum(self.lengths(words))
        return "".join(words[: max(1, int((ends <= self.limit).sum()))]).strip()


class ModelSummariser:
    """A summary written by a causal language model, cut at `limit` of its own tokens."""

    extractive = False
    ASK = (
        "Summarise the conversation in at most two sentences. Keep names, numbers and decisions.\n\n"
        "Summary so far: {summary}\n\nNew:\n{said}"
    )

    def __init__(self, model: Model, run: Run | None = None, limit: int = 60) -> None:
        self.model, self.run, self.limit = model, run or Run(progress=False), limit

    def __call__(self, summary: str, said: str) -> str:
        """What the model answers; the summary so far where it answers nothing."""
        from palimpsest.models.generation import greedy_answers

        asked = self.ASK.format(summary=summary or "(none)", said=said)
        (written,) = greedy_answers(self.model, [asked], self.run, self.limit, label="summarising")
        return " ".join(written.split()) or summary


def without(summary: str, texts: Sequence[str]) -> str:
    """The summary without the sentences that stand in one of the texts: how extracted sentences are forgotten."""
    gone = [" ".join(text.split()) for text in texts]
    kept = [s.strip() for s in sentences(summary) if not any(" ".join(s.split()) in text for text in gone)]
    return "\n".join(kept)
