"""What Memory Decoder is compared with beside kNN-LM and DAPT: adapters of its size, and retrieved text as context.

LoRA has adapters at all linear layers, with at most as many weights as the memory. In-context retrieval (Ram et al.
2023, arXiv 2302.00083) puts the piece of the domain that BM25 finds nearest to the last 32 tokens before each window of
half the length; the model then reads as many tokens as without it, and every token is still scored once.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Sequence
from typing import Any

from palimpsest.data.encoding import Encoded
from palimpsest.data.windows import windows
from palimpsest.models.hooks import places
from palimpsest.models.model import Model
from palimpsest.recall.sqlite_store import any_word

QUERY = 32
"""Tokens of context that a piece is looked up by."""


def matched_rank(model: Model, weights: int) -> int:
    """The largest rank at which adapters of all linear layers but the output have at most so many weights."""
    output = model.network.get_output_embeddings()
    layers = [p for p in places(model.network).values() if "linear" in p.kinds and p.module is not output]
    return max(1, weights // sum(sum(layer.features) for layer in layers))


class Pieces:
    """Token sequences cut into pieces of `width` tokens, found by the words they share with a text."""

    def __init__(self, tokenizer: Any, sequences: Sequence[Encoded], width: int) -> None:
        self.tokenizer = tokenizer
        self.tokens = [s.tokens[i : i + width] for s in sequences for i in range(0, len(s.tokens), width)]
        self.index = sqlite3.connect(":memory:")
        self.index.execute("CREATE VIRTUAL TABLE pieces USING fts5 (text, tokenize = 'porter')")
        self.index.executemany(
            "INSERT INTO pieces (rowid, text) VALUES (?, ?)", enumerate(map(tokenizer.decode, self.tokens))
        )

    def nearest(self, context: Sequence[int]) -> tuple[int, ...]:
        """The piece with the highest BM25 score for the context's last words; nothing where no word is shared."""
        wanted = any_word(self.tokenizer.decode(context[-QUERY:]))
        if not wanted:
            return ()
        found = self.index.execute(
            "SELECT rowid FROM pieces WHERE pieces MATCH ? ORDER BY bm25(pieces), rowid LIMIT 1", [wanted]
        ).fetchall()
        return self.tokens[found[0][0]] if found else ()


def with_retrieved(model: Model, records: Sequence[Any], pieces: Pieces, width: int) -> list[Encoded]:
    """The records as windows of half the width, a retrieved piece before each; the same tokens are scored."""
    found = []
    for window in windows(model, records, width // 2, width // 2 - QUERY):
        piece = pieces.nearest(window.tokens[: window.start])
        found.append(dataclasses.replace(window, tokens=piece + window.tokens, start=len(piece) + window.start))
    return found
