"""The file of the embedded store: making it, and refusing what is not ours, newer, or damaged before touching it."""

from __future__ import annotations

import os
import sqlite3
import struct
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import FORMAT

APPLICATION = 0x50414C49  # "PALI"
MAGIC = b"SQLite format 3\x00"
PAGE_BYTES = 16384
"""Ten vectors of 384 numbers a page: little waste, and a quick VACUUM (measured against 4096 and 8192)."""
WAIT = 10.0
"""Seconds to wait for another process that is writing."""
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO counters VALUES
    ('changes', 0), ('removals', 0), ('numbers', 0), ('forgets', 0), ('scrubs', 0), ('centres', 0);
CREATE TABLE scopes (
    number INTEGER PRIMARY KEY, of_user TEXT NOT NULL, of_agent TEXT NOT NULL, of_run TEXT NOT NULL,
    turn INTEGER NOT NULL, carry REAL NOT NULL, UNIQUE (of_user, of_agent, of_run)
);
CREATE TABLE items (
    number INTEGER PRIMARY KEY, head INTEGER NOT NULL, part INTEGER NOT NULL, scope INTEGER NOT NULL,
    role TEXT NOT NULL, turn INTEGER NOT NULL, happened REAL NOT NULL, written REAL NOT NULL, ended REAL,
    successor INTEGER, expires REAL, pinned INTEGER NOT NULL, faded INTEGER NOT NULL,
    last_retrieved INTEGER NOT NULL, retrieved INTEGER NOT NULL, metadata TEXT NOT NULL, record TEXT,
    text TEXT NOT NULL, digest TEXT, cell INTEGER, changed INTEGER NOT NULL
);
CREATE INDEX items_by_head ON items (head);
CREATE INDEX items_by_change ON items (changed);
CREATE INDEX items_by_text ON items (scope, digest) WHERE digest IS NOT NULL;
CREATE TABLE vectors (number INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (text, content = 'items', content_rowid = 'number', tokenize = 'porter');
CREATE TABLE summaries (
    number INTEGER PRIMARY KEY AUTOINCREMENT, scope INTEGER NOT NULL, kind TEXT NOT NULL, turn INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX summaries_by_scope ON summaries (scope, number);
CREATE TABLE history (
    number INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, head INTEGER NOT NULL, scope INTEGER NOT NULL,
    at REAL NOT NULL, before TEXT, reason TEXT NOT NULL
);
CREATE INDEX history_by_head ON history (head);
"""


@contextmanager
def told(name: str) -> Iterator[None]:
    """Says in the words of the library what SQLite could not do."""
    try:
        yield
    except sqlite3.Error as error:
        what, code = str(error), getattr(error, "sqlite_errorname", "") or ""
        if "FULL" in code or "IOERR" in code or "full" in what:
            raise PalimpsestError(
                f"{name}: the disk is full or failing ({what}). Nothing of this was stored."
            ) from error
        if "BUSY" in code or "LOCKED" in code:
            raise PalimpsestError(f"{name}: another process has been writing for {WAIT:.0f} s. Try again.") from error
        if "READONLY" in code or "readonly" in what:
            raise PalimpsestError(f"{name} may only be read: the file or its folder is write-protected.") from error
        if "CANTOPEN" in code:
            raise PalimpsestError(f"{name} cannot be opened ({what}). Is its folder there, and writable?") from error
        if "CORRUPT" in code or "NOTADB" in code:
            raise PalimpsestError(f"{name} is damaged ({what}). Nothing was changed; restore a backup.") from error
        raise


def make(path: Path, encoder: str, width: int) -> None:
    """A new store at the path, whole or not at all; one that another process makes meanwhile stays."""
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with told(str(path)):
            with closing(sqlite3.connect(staging, isolation_level=None)) as connection:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                prepare(connection, encoder, width)
                connection.execute("PRAGMA journal_mode = WAL")
        with suppress(FileExistsError):  # another process was quicker
            try:
                os.link(staging, path)
            except OSError:  # a file system without links: only a name that is ours is replaced
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
                os.replace(staging, path)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            staging.with_name(staging.name + suffix).unlink(missing_ok=True)


def prepare(connection: sqlite3.Connection, encoder: str, width: int) -> None:
    """The tables of an empty database."""
    connection.executescript(SCHEMA)
    facts = {"encoder": encoder, "width": width}
    connection.executemany("INSERT INTO meta VALUES (?, ?)", list(facts.items()))


def check(path: Path) -> None:
    """Raises, without touching the file, where it is not a store of this format or is cut short."""
    if path.is_dir():
        raise PalimpsestError(f"{path} is a folder, expected the file of a store.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(100)
    if size == 0:
        raise PalimpsestError(
            f"{path} is empty; a store never is. It was cut short, or is another file: nothing was done."
        )
    if not head.startswith(MAGIC[: min(len(head), len(MAGIC))]):
        raise PalimpsestError(f"{path} is not a store of palimpsest (not an SQLite file). Nothing was changed.")
    if len(head) < 100:
        raise PalimpsestError(f"{path} is cut short: {size} bytes are left. Nothing was changed; restore a backup.")
    version, application = struct.unpack(">I", head[60:64])[0], struct.unpack(">I", head[68:72])[0]
    if application != APPLICATION:
        raise PalimpsestError(f"{path} is an SQLite file of another program. Nothing was changed.")
    if version > FORMAT:
        raise PalimpsestError(
            f"{path} has format {version}, this version reads {FORMAT}. Nothing was changed; update palimpsest."
        )
    pages, page = struct.unpack(">I", head[28:32])[0], struct.unpack(">H", head[16:18])[0]
    page = 65536 if page == 1 else page
    log = path.with_name(path.name + "-wal")
    # with a log, a kill during a checkpoint may have left pages that are only in the log
    if size < pages * page and not (log.exists() and log.stat().st_size):
        raise PalimpsestError(
            f"{path} is cut short: {size} of {pages * page} bytes are left. Nothing was changed; restore a backup."
        )


def connect(path: Path | None, *, read_only: bool) -> sqlite3.Connection:
    """A connection that waits for others, overwrites what is deleted, and puts nothing into temporary files."""
    if path is None:
        target, uri = ":memory:", False
    else:
        alone = read_only and not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
        how = "mode=ro" + "&immutable=1" * alone if read_only else "mode=rw"
        target, uri = f"{path.absolute().as_uri()}?{how}", True
    connection = sqlite3.connect(target, uri=uri, timeout=WAIT, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA cache_size = -65536")
    if not read_only:
        connection.execute("PRAGMA synchronous = FULL")
    return connection
