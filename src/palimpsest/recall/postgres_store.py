"""The same store on PostgreSQL with pgvector, for those whom one file no longer suffices: `postgresql://user@host/db`.

The tables lie in the schema `palimpsest`. Every writer takes the lock of one counter first, so changes are one at a
time as in the embedded store. Search by cosine happens in the server, exactly; from `exact_below` chunks on through an
HNSW index that reads on until enough of what it finds is in sight. Words are ranked by `ts_rank_cd`, not by BM25.

What is removed is deleted, and the tables that hold words are rewritten (`VACUUM FULL`), so that none holds it. The
server's write-ahead log, its replicas and its backups keep their copies as long as the server is told to keep them: the
promise that no byte is left in any file is the embedded store's alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from jaxtyping import Float

from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import FORMAT, Fresh, Ranked
from palimpsest.recall.memories import Ages, New, Sight
from palimpsest.recall.reading import embedding, scope_numbers, seen
from palimpsest.recall.scrubbing import LEFT, make_good, outstanding, told_as_removed

WAIT = 10_000
"""Milliseconds to wait for another writer."""
SCHEMA = """
CREATE SCHEMA palimpsest;
CREATE TABLE palimpsest.meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE palimpsest.counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
INSERT INTO palimpsest.counters VALUES ('changes', 0), ('removals', 0), ('numbers', 0), ('forgets', 0), ('scrubs', 0);
CREATE TABLE palimpsest.scopes (
    number BIGINT PRIMARY KEY, of_user TEXT NOT NULL, of_agent TEXT NOT NULL, of_run TEXT NOT NULL,
    turn BIGINT NOT NULL, carry DOUBLE PRECISION NOT NULL, UNIQUE (of_user, of_agent, of_run)
);
CREATE TABLE palimpsest.items (
    number BIGINT PRIMARY KEY, head BIGINT NOT NULL, part INTEGER NOT NULL, scope BIGINT NOT NULL, role TEXT NOT NULL,
    turn BIGINT NOT NULL, happened DOUBLE PRECISION NOT NULL, written DOUBLE PRECISION NOT NULL,
    ended DOUBLE PRECISION, successor BIGINT, expires DOUBLE PRECISION, pinned SMALLINT NOT NULL,
    faded SMALLINT NOT NULL, last_retrieved BIGINT NOT NULL, retrieved BIGINT NOT NULL, metadata TEXT NOT NULL,
    record TEXT, text TEXT NOT NULL, digest TEXT, cell INTEGER, changed BIGINT NOT NULL,
    words TSVECTOR GENERATED ALWAYS AS (to_tsvector('english', text)) STORED
);
CREATE INDEX items_by_head ON palimpsest.items (head);
CREATE INDEX items_by_scope ON palimpsest.items (scope);
CREATE INDEX items_by_text ON palimpsest.items (scope, digest) WHERE digest IS NOT NULL;
CREATE INDEX items_by_words ON palimpsest.items USING gin (words);
CREATE TABLE palimpsest.vectors (number BIGINT PRIMARY KEY, vector VECTOR({width}) NOT NULL);
CREATE TABLE palimpsest.summaries (
    number BIGSERIAL PRIMARY KEY, scope BIGINT NOT NULL, kind TEXT NOT NULL, turn BIGINT NOT NULL, text TEXT NOT NULL
);
CREATE TABLE palimpsest.history (
    number BIGSERIAL PRIMARY KEY, event TEXT NOT NULL, head BIGINT NOT NULL, scope BIGINT NOT NULL,
    at DOUBLE PRECISION NOT NULL, before TEXT, reason TEXT NOT NULL
);
CREATE INDEX history_by_head ON palimpsest.history (head);
"""


class PostgresEngine:
    """One connection to a server; safe to share between threads. `fresh` gives encoder and width of a new store."""

    read_only = False

    def __init__(self, address: str, fresh: Fresh, *, must_exist: bool = False) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise PalimpsestError(
                "a store on PostgreSQL needs psycopg and pgvector: pip install 'palimpsest[postgres]'."
            ) from error
        self._errors = psycopg
        self.name = "postgresql://" + address.partition("://")[2].rpartition("@")[2]  # without a password
        self._lock, self._depth = threading.RLock(), 0
        with self._told():
            self._connection = psycopg.connect(address, autocommit=True)
            self.all(f"SET lock_timeout = {WAIT}")
            self.all("SET client_min_messages = warning")
            self._check_extension()
            if not self.all("SELECT 1 FROM information_schema.schemata WHERE schema_name = 'palimpsest'"):
                if must_exist:
                    raise PalimpsestError(f"there is no store in {self.name}.")
                self._make(*fresh())
            self.all("SET search_path TO palimpsest, public")
        from pgvector.psycopg import register_vector

        register_vector(self._connection)
        if (version := int(self.all("SELECT value FROM meta WHERE name = 'format'")[0][0])) > FORMAT:
            self.close()
            raise PalimpsestError(
                f"{self.name} has format {version}, this version reads {FORMAT}. Nothing was changed."
            )
        self.restart()
        make_good(self)

    def _check_extension(self) -> None:
        if not self.all("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
            raise PalimpsestError(
                f"the server {self.name} has no extension `vector`. Install pgvector on it, or use the embedded store."
            )
        with suppress(self._errors.errors.UniqueViolation):  # another one was quicker
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")

    def _make(self, encoder: str, width: int) -> None:
        quicker = self._errors.errors.DuplicateSchema, self._errors.errors.UniqueViolation
        with suppress(*quicker), self._connection.transaction():
            self._connection.execute(SCHEMA.format(width=int(width)))
            facts = {"encoder": encoder, "width": str(width), "format": str(FORMAT)}
            for name, value in facts.items():
                self._connection.execute("INSERT INTO palimpsest.meta VALUES (%s, %s)", (name, value))

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    # --- statements --------------------------------------------------------------------------------------------------

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._errors.errors.LockNotAvailable as error:
            raise PalimpsestError(f"{self.name}: another process has been writing for {WAIT // 1000} s.") from error
        except self._errors.errors.DiskFull as error:
            raise PalimpsestError(f"{self.name}: the server's disk is full. Nothing of this was stored.") from error
        except self._errors.Error as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PalimpsestError(f"{self.name}: {first}.") from error

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """A change of everything or nothing, one at a time over all processes; nested ones join the outer."""
        with self._lock:
            if self._depth:
                yield
                return
            with self._told(), self._connection.transaction():
                self._depth = 1
                try:
                    if not durable:
                        self.all("SET LOCAL synchronous_commit = OFF")
                    self.all("SELECT value FROM counters WHERE name = 'changes' FOR UPDATE")
                    yield
                finally:
                    self._depth = 0

    def all(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a statement; `?` stands for an argument."""
        with self._lock, self._told():
            done = self._connection.execute(sql.replace("?", "%s"), list(arguments) or None)
            return done.fetchall() if done.description else []

    def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """One statement for many rows."""
        with self._lock, self._told(), self._connection.cursor() as cursor:
            cursor.executemany(sql.replace("?", "%s"), rows)

    def check_encoder(self) -> None:
        """Raises where another process has re-embedded the store since it was opened."""
        if (now := embedding(self)) != self._embedding:
            raise PalimpsestError(f"{self.name} was re-embedded with {now.encoder} meanwhile. Open it again.")

    # --- chunks ------------------------------------------------------------------------------------------------------

    def put_chunks(self, numbers: Sequence[int], rows: Sequence[New]) -> None:
        """Stores vectors of chunks; their words are a column that the server fills."""
        self.put_vectors(numbers, [row.vector for row in rows])

    def put_vectors(self, numbers: Sequence[int], vectors: Sequence[Any]) -> None:
        """Stores vectors of chunks that have none."""
        made = [(n, np.asarray(v, np.float32)) for n, v in zip(numbers, vectors, strict=True)]
        self.many("INSERT INTO vectors VALUES (?, ?)", made)

    def drop_chunks(self, numbers: Sequence[int]) -> None:
        """Removes vectors of chunks."""
        self.all(f"DELETE FROM vectors WHERE number IN ({', '.join(map(str, numbers)) or 'NULL'})")

    def nearest(self, vector: Float[np.ndarray, " width"], limit: int, sight: Sight) -> Ranked:
        """Chunks by cosine, best first; of equal ones the newest turn, then the lower number."""
        self.check_encoder()
        condition, arguments = seen(sight, scope_numbers(self, sight.scope))
        query = np.asarray(vector, np.float32)
        with self._lock, self._told(), self._connection.transaction():
            self.all("SET LOCAL hnsw.iterative_scan = strict_order")
            self.all(f"SET LOCAL hnsw.ef_search = {max(40, min(limit, 1000))}")
            rows = self.all(
                "SELECT items.number, 1 - (vector <=> ?) FROM vectors JOIN items USING (number) "
                f"WHERE {condition} ORDER BY vector <=> ?, turn DESC, items.number LIMIT ?",
                [query, *arguments, query, limit],
            )
        return [(number, score) for number, score in rows]

    def alike(self, vector: Float[np.ndarray, " width"], least: float, sight: Sight) -> Ranked:
        """All chunks with at least that cosine, best first; exact, whatever makes search quick."""
        self.check_encoder()
        condition, arguments = seen(sight, scope_numbers(self, sight.scope))
        query = np.asarray(vector, np.float32)
        rows = self.all(  # no index can answer a condition on the distance
            "SELECT items.number, 1 - (vector <=> ?) AS cosine FROM vectors JOIN items USING (number) "
            f"WHERE {condition} AND 1 - (vector <=> ?) >= ? ORDER BY cosine DESC, turn DESC, items.number",
            [query, *arguments, query, least],
        )
        return [(number, score) for number, score in rows]

    def matching(self, words: str, limit: int, sight: Sight) -> Ranked:
        """Chunks that share words with a text, by cover density."""
        condition, arguments = seen(sight, scope_numbers(self, sight.scope))
        rows = self.all(
            "WITH asked AS (SELECT "
            "NULLIF(replace(plainto_tsquery('english', ?)::text, '&', '|'), '')::tsquery AS any_of) "
            "SELECT items.number, ts_rank_cd(words, any_of) AS score FROM items, asked "
            f"WHERE words @@ any_of AND {condition} ORDER BY score DESC, turn DESC, items.number LIMIT ?",
            [words, *arguments, limit],
        )
        return [(number, score) for number, score in rows]

    def ages(self, sight: Sight) -> Ages:
        """What salience is computed from."""
        condition, arguments = seen(sight, scope_numbers(self, sight.scope))
        rows = self.all(
            f"SELECT number, turn, last_retrieved, pinned FROM items WHERE {condition} ORDER BY number", arguments
        )
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        return Ages(columns[0], columns[1], columns[2], columns[3].astype(bool))

    def vectors(self, numbers: Sequence[int]) -> Float[np.ndarray, "chunks width"]:
        """The vectors of chunks; zero for one that is no longer there."""
        listed = ", ".join(map(str, numbers)) or "NULL"
        rows = dict(self.all(f"SELECT number, vector FROM vectors WHERE number IN ({listed})"))
        gone = np.zeros(self.width, np.float32)
        found = [rows[n].to_numpy() if n in rows else gone for n in numbers]
        return np.array(found, np.float32).reshape(-1, self.width)

    # --- upkeep ------------------------------------------------------------------------------------------------------

    def new_width(self, width: int) -> None:
        """Drops all vectors, to make room for those of another width; `restart` follows the transaction."""
        self.all("DROP TABLE vectors")
        self.all(f"CREATE TABLE vectors (number BIGINT PRIMARY KEY, vector VECTOR({int(width)}) NOT NULL)")

    def restart(self) -> None:
        """Takes note of what made the vectors, at first and after a change of the encoder."""
        self._embedding = embedding(self)
        self.encoder, self.width = self._embedding.encoder, self._embedding.width

    def accelerate(self, exact_below: int) -> None:
        """An HNSW index on the vectors where there are more than that."""
        if self.all("SELECT COUNT(*) FROM vectors")[0][0] > exact_below:
            self.all("CREATE INDEX IF NOT EXISTS vectors_near ON vectors USING hnsw (vector vector_cosine_ops)")

    def scrub(self) -> None:
        """Rewrites the tables that hold words without what was removed."""
        with self._lock, told_as_removed(self.name):
            forgets = self.all("SELECT value FROM counters WHERE name = 'forgets'")[0][0]
            for table in ("items", "summaries", "history", "scopes"):
                self.all(f"VACUUM FULL {table}")
            self.all("VACUUM vectors")  # no words in it, and rewriting would build its index again
            self.all("UPDATE counters SET value = ? WHERE name = 'scrubs'", (forgets,))

    def problems(self) -> list[str]:
        """What the tables say is wrong."""
        orphans = self.all("SELECT COUNT(*) FROM vectors WHERE number NOT IN (SELECT number FROM items)")[0][0]
        without = self.all("SELECT COUNT(*) FROM items WHERE number NOT IN (SELECT number FROM vectors)")[0][0]
        found = [f"{orphans} vectors belong to no memory"] * bool(orphans)
        return found + [f"{without} chunks have no vector"] * bool(without) + [LEFT] * outstanding(self)

    def bytes(self) -> int:
        """How much space the tables and their indexes take."""
        sql = "SELECT COALESCE(SUM(pg_total_relation_size(c.oid)), 0) FROM pg_class c JOIN pg_namespace n ON "
        sql += "n.oid = c.relnamespace WHERE n.nspname = 'palimpsest' AND c.relkind = 'r'"
        return int(self.all(sql)[0][0])
