"""Memories as JSON lines: one schema for export, import and everything that reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from palimpsest.data.rows import record_of
from palimpsest.errors import PalimpsestError
from palimpsest.recall import reading
from palimpsest.recall.items import Items, as_json
from palimpsest.recall.memories import Memory, Scope, packed

KEPT = "role turn happened ended expires pinned faded".split()
BATCH = 256


def as_line(memory: Memory) -> dict[str, Any]:
    """All that a store knows of a memory, but not its vectors."""
    named = ("identity", "role", "turn", "happened", "written", "ended", "successor", "expires", "pinned", "faded")
    record = json.loads(packed(memory.record) or json.dumps({"text": memory.record.text}))
    scope = {"user": memory.scope.user, "agent": memory.scope.agent, "run": memory.scope.run}
    return record | {name: getattr(memory, name) for name in named} | scope | {"metadata": dict(memory.metadata)}


def exported(items: Items) -> Iterator[str]:
    """A line for each memory, current or not, oldest first."""
    for memory in reading.listing(items.opened.engine, items.sight("all")):
        yield json.dumps(as_line(memory), ensure_ascii=False)


def imported(items: Items, lines: Iterable[str], name: str = "import") -> list[str]:
    """Stores the memories of an export in one transaction, all of them or none; their new identities.

    They belong to this user; agent, run, turns, times and what superseded what stay as they were. A line needs no more
    than a `text`.
    """
    rows = list(_rows(lines, name))
    engine, storage = items.opened.engine, items.opened.storage
    moved: dict[str, int] = {}
    identities = []
    with engine.transaction():
        for number, row, record in rows:
            about = {key: row[key] for key in KEPT if row.get(key) is not None}
            try:
                news = items.news(record, metadata=as_json(row.get("metadata")), **about)
                scope = Scope(user=items.scope.user, agent=row.get("agent"), run=row.get("run"))
            except (PalimpsestError, TypeError) as error:
                raise PalimpsestError(f"{name}, line {number}: {error} Nothing was stored.") from error
            ahead = (0,) if row.get("turn") is not None else ()
            (head,) = storage.add(scope, [news], time.time(), ahead=ahead)
            moved[str(row.get("identity"))] = head
            identities.append(str(head))
        for _, row, _ in rows:
            if row.get("successor") is not None and str(row["successor"]) in moved:
                pair = moved[str(row["successor"])], moved[str(row.get("identity"))]
                engine.all("UPDATE items SET successor = ? WHERE head = ?", pair)
    return identities


def _rows(lines: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any], Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PalimpsestError(f"{name}, line {number}: not valid JSON ({error.msg}). Nothing was stored.") from None
        if not isinstance(row, dict):
            raise PalimpsestError(f"{name}, line {number}: expected an object. Nothing was stored.")
        yield number, row, record_of(row, f"{name}, line {number}")
