"""Opening a store by its name, and the encoder that belongs to it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import Engine
from palimpsest.recall.memories import check_vector
from palimpsest.recall.storage import Storage

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
PROBE = "A palimpsest is a page that was written, scraped and written again."
"""What an encoder is told by: its vector for this sentence is kept in the store."""
SAME = 0.999
BATCH = 256


class Opened:
    """A store and its encoder, which is loaded when it is first asked for."""

    def __init__(self, engine: Any, given: Any = None) -> None:
        self.engine: Engine = engine
        self.storage = Storage(engine)
        self.width: int = engine.width
        self._given = given

    @cached_property
    def encoder(self) -> Any:
        """The encoder that made the vectors; one that makes others now raises."""
        engine = self.engine
        found = self._given if self._given is not None else _load(engine.encoder)
        if found.width != self.width:
            raise PalimpsestError(
                f"the encoder {found.name} makes vectors of {found.width} numbers, {engine.name} keeps {self.width}."
            )
        probe = check_vector(np.asarray(found.encode([PROBE]))[0], self.width)
        if kept := engine.all("SELECT value FROM meta WHERE name = 'probe'"):
            alike = float(np.dot(probe, np.array(json.loads(kept[0][0]), np.float32)))
            if alike < SAME:
                raise PalimpsestError(
                    f"the encoder {found.name} gives other vectors than when {engine.name} was made "
                    f"(cosine {alike:.2f}). Use its files of then, or re-embed the store."
                )
        elif not engine.read_only:
            engine.all("INSERT INTO meta VALUES ('probe', ?) ON CONFLICT DO NOTHING", (json.dumps(probe.tolist()),))
        return found

    def reembed(self, encoder: Any, track: Any = iter) -> int:
        """Makes all vectors of the store again with another encoder, in one transaction; how many."""
        engine, given = self.engine, encoder if not isinstance(encoder, str) else _load(encoder)
        width = int(given.width)
        with engine.transaction():
            rows = engine.all("SELECT number, text FROM items ORDER BY number")
            engine.new_width(width)
            for start in track(range(0, len(rows), BATCH)):
                part = rows[start : start + BATCH]
                made = np.asarray(given.encode([text for _, text in part]))
                engine.put_vectors([number for number, _ in part], [check_vector(row, width) for row in made])
            probe = check_vector(np.asarray(given.encode([PROBE]))[0], width)
            facts = {"encoder": str(given.name), "width": str(width), "probe": json.dumps(probe.tolist())}
            facts["embedding"] = uuid.uuid4().hex  # by which others notice, even where the name stays
            engine.many("DELETE FROM meta WHERE name = ?", [(name,) for name in facts])
            engine.many("INSERT INTO meta VALUES (?, ?)", list(facts.items()))
            engine.all("UPDATE counters SET value = value + 1 WHERE name = 'changes'")
            engine.all("UPDATE items SET changed = (SELECT value FROM counters WHERE name = 'changes')")
        engine.restart()
        self.width, self._given = width, given
        self.__dict__.pop("encoder", None)
        return len(rows)

    def encode(self, texts: Sequence[str]) -> list[Float[np.ndarray, " width"]]:
        """Unit vectors of the texts; an encoder that gives anything else raises."""
        return [check_vector(row, self.width) for row in np.asarray(self.encoder.encode(list(texts)))]


def open_store(
    store: str, encoder: str | None, given: Any = None, *, must_exist: bool = False, read_only: bool = False
) -> Opened:
    """The store of that name: a file, `:memory:`, or a postgresql:// address; a new one is made for the encoder."""

    def fresh() -> tuple[str, int]:
        made = given if given is not None else _load(encoder or DEFAULT_ENCODER)
        return str(made.name), int(made.width)

    if not str(store).strip():
        raise PalimpsestError("the store has no name. Name a file, or a postgresql:// address.")
    engine: Engine
    if str(store).startswith(("postgresql://", "postgres://")):
        from palimpsest.recall.postgres_store import PostgresEngine

        engine = PostgresEngine(str(store), fresh, must_exist=must_exist)
    else:
        from palimpsest.recall.sqlite_store import SQLiteEngine

        path = None if store == ":memory:" else Path(store).expanduser()
        engine = SQLiteEngine(path, fresh, must_exist=must_exist, read_only=read_only)
    if encoder is not None and engine.encoder != encoder:
        engine.close()
        raise PalimpsestError(
            f"{engine.name} was made with the encoder {engine.encoder}, not {encoder}. "
            "Leave the encoder out, or re-embed the store."
        )
    return Opened(engine, given)


def _load(name: str) -> Any:
    from palimpsest.models.encoder import sentence_encoder

    return sentence_encoder(name)
