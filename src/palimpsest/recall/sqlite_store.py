"""The embedded store: one SQLite file in WAL mode holds text, vectors, the full-text index and the history.

A change of all four is one transaction, on the disk before the call returns. Vectors are blobs; search runs over a
copy of them in memory, made when it is first needed. It follows other processes: every change has a number that its
rows carry, so a search compares one counter and reads only what is new. sqlite-vec would keep the vectors in the
database, but it is an extension, and Python's own sqlite3 is often built without loading them (it is here); it also
searches by reading all rows, which takes longer than the copy in memory.

What was removed leaves no bytes: pages are overwritten on deletion, the full-text index is merged into one segment
(its tombstones keep the words otherwise; the option that would delete at once needs SQLite 3.42), the file is rebuilt
(moving rows between pages leaves copies that overwriting misses), and the log is emptied. A kill in between is noticed
by the counter `scrubs` and made good when the store is opened. Blocks that the file system has freed, snapshots and
backups are not ours to overwrite.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from palimpsest.errors import PalimpsestError
from palimpsest.recall import sqlite_file
from palimpsest.recall.engine import Fresh, Ranked
from palimpsest.recall.memories import Ages, New, Sight
from palimpsest.recall.reading import embedding, scope_numbers, seen
from palimpsest.recall.scrubbing import LEFT, make_good, outstanding, told_as_removed
from palimpsest.recall.sqlite_file import told
from palimpsest.recall.vector_index import COLUMNS, VectorIndex, columns_of

BATCH = 1024


class SQLiteEngine:
    """One open file, or a database in memory; safe to share between threads. `fresh` tells the encoder of a new one."""

    def __init__(
        self,
        path: Path | None,
        fresh: Fresh,
        *,
        must_exist: bool = False,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self.name = "the store in memory" if path is None else str(path)
        self._lock, self._depth = threading.RLock(), 0
        if path is not None and not path.exists():
            if must_exist or read_only:
                raise PalimpsestError(f"there is no store {path}.")
            sqlite_file.make(path, *fresh())
        self.read_only = read_only or (path is not None and not os.access(path, os.W_OK))
        if path is not None:
            sqlite_file.check(path)
        with told(self.name):
            self._connection = sqlite_file.connect(path, read_only=self.read_only)
            try:
                if path is None:
                    sqlite_file.prepare(self._connection, *fresh())
                self._start()
                if not self.read_only:
                    make_good(self)  # a kill may have come between a removal and its scrubbing
            except BaseException:
                self._connection.close()
                raise

    def _start(self) -> None:
        self._embedding = embedding(self)
        self.encoder, self.width = self._embedding.encoder, self._embedding.width
        self._index = VectorIndex(self.width)
        self._accelerated = 0
        self._seen = {"changes": 0, "removals": 0, "centres": 0}

    def close(self) -> None:
        """Ends the connection; the last one to leave empties the log."""
        with self._lock:
            self._connection.close()

    # --- statements --------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """A change of everything or nothing, one at a time over all processes; nested ones join the outer."""
        with self._lock:
            if self._depth:
                yield
                return
            with told(self.name):
                if not durable:
                    self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.execute("BEGIN IMMEDIATE")
                self._depth = 1
                try:
                    yield
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                finally:
                    self._depth = 0
                    if not durable:
                        self._connection.execute("PRAGMA synchronous = FULL")

    def all(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a statement; `?` stands for an argument."""
        with self._lock, told(self.name):
            return self._connection.execute(sql, arguments).fetchall()

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """One statement for many rows."""
        with self._lock, told(self.name):
            self._connection.executemany(sql, rows)

    def check_encoder(self) -> None:
        """Raises where another process has re-embedded the store since it was opened."""
        if (now := embedding(self)) != self._embedding:
            raise PalimpsestError(f"{self.name} was re-embedded with {now.encoder} meanwhile. Open it again.")

    # --- chunks ------------------------------------------------------------------------------------------------------

    def put_chunks(self, numbers: Sequence[int], rows: Sequence[New]) -> None:
        """Stores vectors and words of chunks whose items are there."""
        self.many(
            "INSERT INTO words (rowid, text) VALUES (?, ?)", [(n, r.text) for n, r in zip(numbers, rows, strict=True)]
        )
        self.put_vectors(numbers, [row.vector for row in rows])

    def put_vectors(self, numbers: Sequence[int], vectors: Sequence[Any]) -> None:
        """Stores vectors of chunks that have none."""
        made = np.stack(vectors).astype(np.float32)
        self.many("INSERT INTO vectors VALUES (?, ?)", [(n, v.tobytes()) for n, v in zip(numbers, made, strict=True)])
        if self._index.centres is not None and made.shape[1] == self._index.width:
            cells = self._index.cell_of(made).tolist()
            self.many("UPDATE items SET cell = ? WHERE number = ?", list(zip(cells, numbers, strict=True)))

    def drop_chunks(self, numbers: Sequence[int]) -> None:
        """Removes vectors and words of chunks whose items are still there."""
        listed = ", ".join(map(str, numbers)) or "NULL"
        self.all(
            "INSERT INTO words (words, rowid, text) "
            f"SELECT 'delete', number, text FROM items WHERE number IN ({listed})"
        )
        self.all(f"DELETE FROM vectors WHERE number IN ({listed})")

    def nearest(self, vector: Float[np.ndarray, " width"], limit: int, sight: Sight) -> Ranked:
        """Chunks by cosine, best first."""
        with self._lock:
            self._follow()
            return self._index.nearest(vector, limit, self._mask(sight))

    def alike(self, vector: Float[np.ndarray, " width"], least: float, sight: Sight) -> Ranked:
        """All chunks with at least that cosine, best first; exact, whatever makes search quick."""
        with self._lock:
            self._follow()
            return self._index.alike(vector, least, self._mask(sight))

    def matching(self, words: str, limit: int, sight: Sight) -> Ranked:
        """Chunks that share words with a text, by BM25."""
        if not (wanted := any_word(words)):
            return []
        condition, arguments = seen(sight, scope_numbers(self, sight.scope))
        rows = self.all(
            "SELECT items.number, -bm25(words) AS score FROM words JOIN items ON items.number = words.rowid "
            f"WHERE words MATCH ? AND {condition} ORDER BY bm25(words), items.turn DESC, items.number LIMIT ?",
            [wanted, *arguments, limit],
        )
        return [(number, score) for number, score in rows]

    def ages(self, sight: Sight) -> Ages:
        """What salience is computed from."""
        with self._lock:
            self._follow()
            return self._index.ages(self._mask(sight))

    def vectors(self, numbers: Sequence[int]) -> Float[np.ndarray, "chunks width"]:
        """The vectors of chunks; zero for one that is no longer there."""
        with self._lock:
            self._follow()
            return self._index.of(numbers)

    # --- the copy in memory ------------------------------------------------------------------------------------------

    def _mask(self, sight: Sight) -> np.ndarray:
        scopes = scope_numbers(self, sight.scope)
        return self._index.visible(sight, None if scopes is None else np.array(scopes, np.int64))

    def _follow(self) -> None:
        """Brings the copy up to date with the file, whoever changed it."""
        counters = dict(self.all("SELECT name, value FROM counters"))
        if counters["changes"] == self._seen["changes"]:
            return
        inside = self._connection.in_transaction
        if not inside:
            self.all("BEGIN")  # one snapshot for all that follows
        try:
            counters = dict(self.all("SELECT name, value FROM counters"))
            self.check_encoder()
            if counters["centres"] != self._seen["centres"]:
                stored = self.all("SELECT value FROM meta WHERE name = 'centres'")[0][0]
                self._index.centres = np.frombuffer(stored, np.float32).reshape(-1, self.width)
                self._accelerated = int(self.all("SELECT value FROM meta WHERE name = 'accelerated'")[0][0])
            if counters["removals"] != self._seen["removals"]:
                self._index.keep(np.array([row[0] for row in self.all("SELECT number FROM items")], np.int64))
            self._read()
            self._index.fill_cells()
        finally:
            if not inside:
                self.all("COMMIT")
        self._seen = {name: counters[name] for name in self._seen}

    def _read(self) -> None:
        names = ", ".join(f"items.{name}" for name in COLUMNS)
        sql = f"SELECT vector, {names} FROM items JOIN vectors USING (number)"
        if since := self._seen["changes"]:  # the plus: find by change, then sort; not the other way round
            sql, arguments = f"{sql} WHERE changed > ? ORDER BY +items.number", [since]
        else:
            sql, arguments = f"{sql} ORDER BY items.number", []
            self._index.reserve(self.all("SELECT COUNT(*) FROM items")[0][0])
        with told(self.name):
            cursor = self._connection.execute(sql, arguments)
            while rows := cursor.fetchmany(BATCH):
                vectors = np.frombuffer(b"".join([row[0] for row in rows]), np.float32).reshape(-1, self.width)
                self._index.put(columns_of([row[1:] for row in rows]), vectors)

    # --- upkeep ------------------------------------------------------------------------------------------------------

    def new_width(self, width: int) -> None:
        """Drops all vectors, to make room for those of another width; `restart` follows the transaction."""
        self.all("DELETE FROM vectors")
        self.all("DELETE FROM meta WHERE name IN ('centres', 'accelerated')")
        self.all("UPDATE counters SET value = 0 WHERE name = 'centres'")
        self.all("UPDATE items SET cell = NULL")

    def restart(self) -> None:
        """Reads everything again, after a change of the encoder."""
        with self._lock:
            self._start()

    def accelerate(self, exact_below: int) -> None:
        """Finds cells for the vectors, keeps them in the file, and searches the nearest cells only from now on.

        Does nothing where there are not more vectors than `exact_below`, or less than twice as many as the last time.
        """
        with self._lock:
            self._follow()
            if self._index.size <= max(exact_below, 2 * self._accelerated):
                return
            centres = self._index.find_centres()  # seconds, in which others may write
        with self.transaction():
            self._follow()
            self._index.centres = centres
            cells = self._index.cell_of(self._index.vectors).tolist()
            self.many(
                "UPDATE items SET cell = ? WHERE number = ?",
                list(zip(cells, self._index["number"].tolist(), strict=True)),
            )
            self.all("INSERT OR REPLACE INTO meta VALUES ('centres', ?)", (centres.tobytes(),))
            self.all("UPDATE counters SET value = value + 1 WHERE name = 'centres'")
            changed = self.all("UPDATE counters SET value = value + 1 WHERE name = 'changes' RETURNING value")[0][0]
            self.all("UPDATE items SET changed = ?", (changed,))
            self.all("INSERT OR REPLACE INTO meta VALUES ('accelerated', ?)", (self._index.size,))

    def scrub(self) -> None:
        """Leaves no bytes of what was removed in the file, its log, or the full-text index."""
        with self._lock, told_as_removed(self.name), told(self.name):
            with self.transaction():
                forgets = self.all("SELECT value FROM counters WHERE name = 'forgets'")[0][0]
                self.all("INSERT INTO words (words) VALUES ('optimize')")
            if self.path is not None:
                self.all("VACUUM")
                if not self._emptied_log():
                    raise PalimpsestError("another process still reads the log, where the bytes may be left")
            # only now: a kill before this line leaves the store marked as not yet scrubbed
            self.all("UPDATE counters SET value = ? WHERE name = 'scrubs'", (forgets,))

    def _emptied_log(self) -> bool:
        """Empties the log; SQLite waits for readers and writers, but not for a checkpoint of another process."""
        until = time.monotonic() + sqlite_file.WAIT
        while busy := self.all("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        return not busy

    def problems(self) -> list[str]:
        """What SQLite, the full-text index and the tables say is wrong."""
        found = [row[0] for row in self.all("PRAGMA integrity_check") if row[0] != "ok"]
        if not self.read_only:
            try:
                self.all("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
            except PalimpsestError as error:
                found.append(f"full-text index: {error}")
        orphans = self.all("SELECT COUNT(*) FROM vectors WHERE number NOT IN (SELECT number FROM items)")[0][0]
        without = self.all("SELECT COUNT(*) FROM items WHERE number NOT IN (SELECT number FROM vectors)")[0][0]
        found += [f"{orphans} vectors belong to no memory"] * bool(orphans)
        found += [f"{without} chunks have no vector"] * bool(without)
        return found + [LEFT] * outstanding(self)

    def bytes(self) -> int:
        """How much space the file and its log take."""
        if self.path is None:
            page, count = (self.all(f"PRAGMA {name}")[0][0] for name in ("page_size", "page_count"))
            return int(page * count)
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())


def any_word(text: str) -> str:
    """The full-text query for what shares any word with the text; empty where the text has none."""
    return " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", text.lower())))
