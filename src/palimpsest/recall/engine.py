"""What a database must bring to be a store: transactions, statements, vectors, full-text search and upkeep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from palimpsest.recall.memories import Ages, New, Sight

FORMAT = 1
"""The version of the tables."""
PAGE = 1000
"""Rows that one statement names."""
Ranked = list[tuple[int, float]]
"""Numbers of chunks with their scores, best first."""
Fresh = Callable[[], tuple[str, int]]
"""Name and width of the encoder of a store that has to be made."""


class Engine(Protocol):
    """One open database."""

    name: str
    encoder: str
    width: int
    read_only: bool

    def transaction(self, durable: bool = True) -> AbstractContextManager[None]:
        """A change of everything or nothing, one at a time over all processes; nested ones join the outer."""

    def all(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a statement; `?` stands for an argument."""

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """One statement for many rows."""

    def check_encoder(self) -> None:
        """Raises where another process has re-embedded the store since it was opened."""

    def put_chunks(self, numbers: Sequence[int], rows: Sequence[New]) -> None:
        """Stores vectors and words of chunks whose items are there."""

    def put_vectors(self, numbers: Sequence[int], vectors: Sequence[Any]) -> None:
        """Stores vectors of chunks that have none."""

    def drop_chunks(self, numbers: Sequence[int]) -> None:
        """Removes vectors and words of chunks whose items are still there."""

    def nearest(self, vector: Any, limit: int, sight: Sight) -> Ranked:
        """Chunks by cosine, best first."""

    def alike(self, vector: Any, least: float, sight: Sight) -> Ranked:
        """All chunks with at least that cosine, best first; exact, whatever makes search quick."""

    def matching(self, words: str, limit: int, sight: Sight) -> Ranked:
        """Chunks that share words with a text, best first."""

    def ages(self, sight: Sight) -> Ages:
        """What salience is computed from."""

    def vectors(self, numbers: Sequence[int]) -> Any:
        """The vectors of chunks; zero for one that is no longer there."""

    def new_width(self, width: int) -> None:
        """Drops all vectors, to make room for those of another width; `restart` follows the transaction."""

    def restart(self) -> None:
        """Reads everything again, after a change of the encoder."""

    def accelerate(self, exact_below: int) -> None:
        """Builds what makes search quick where there are more chunks than that; until then search is exact."""

    def scrub(self) -> None:
        """Leaves no bytes of what was removed in any file, as far as the database lets it."""

    def problems(self) -> list[str]:
        """What is wrong with the files."""

    def bytes(self) -> int:
        """How much space it takes."""

    def close(self) -> None:
        """Ends the connection."""
