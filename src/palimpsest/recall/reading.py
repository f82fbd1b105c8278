"""Reading from a store: what is in sight, memories with their chunks, summaries and history, on any engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palimpsest.recall.engine import PAGE, Engine
from palimpsest.recall.memories import Change, Embedding, Memory, Scope, Sight, State, Summary, text_of, unpacked

COLUMNS = (
    "number head part scope role turn happened written ended successor expires pinned faded last_retrieved retrieved "
    "metadata record text digest cell changed"
).split()
"""Of the table `items`."""
FREE = "free"
"""The note on the first summary of a scope that is not made of sentences of what was said."""
PRUNED = "pruned"
"""The note on the turn of a scope's last pruning."""


def scope_numbers(engine: Engine, scope: Scope) -> list[int] | None:
    """The numbers of all scopes that the scope covers; None where it covers everything."""
    wanted = [(f"of_{name}", part) for name, part in zip(("user", "agent", "run"), scope.parts, strict=True) if part]
    if not wanted:
        return None
    sql = "SELECT number FROM scopes WHERE " + " AND ".join(f"{column} = ?" for column, _ in wanted)
    return [row[0] for row in engine.all(sql, [part for _, part in wanted])]


def seen(sight: Sight, scopes: Sequence[int] | None) -> tuple[str, list[Any]]:
    """The condition on `items` that the sight means, and its arguments."""
    terms, arguments = ["1 = 1"], list[Any]()
    if scopes is not None:
        terms.append(f"scope IN ({listed(scopes)})")
    if sight.as_of is not None:
        terms.append("faded = 0 AND happened <= ? AND (ended IS NULL OR ended > ?)")
        terms.append("(expires IS NULL OR expires > ?)")
        arguments += [sight.as_of] * 3
    elif sight.view == "current":
        terms.append("faded = 0 AND ended IS NULL AND (expires IS NULL OR expires > ?)")
        arguments.append(sight.now)
    if sight.without:
        terms.append(f"items.number NOT IN ({listed(sorted(sight.without))})")
    return " AND ".join(terms), arguments


def inside(engine: Engine, scope: Scope, column: str = "scope") -> str:
    """The condition that a column holds one of the scopes that the scope covers."""
    covered = scope_numbers(engine, scope)
    return " WHERE 1 = 1" if covered is None else f" WHERE {column} IN ({listed(covered)})"


def counter(engine: Engine, name: str) -> int:
    """The value of a counter."""
    return int(engine.all("SELECT value FROM counters WHERE name = ?", (name,))[0][0])


def embedding(engine: Engine) -> Embedding:
    """What made the vectors that are stored now."""
    facts = dict(engine.all("SELECT name, value FROM meta WHERE name IN ('encoder', 'width', 'embedding')"))
    return Embedding(str(facts["encoder"]), int(facts["width"]), facts.get("embedding"))


def note(engine: Engine, name: str, place: int) -> int | None:
    """What is noted about the scope of that number."""
    found = engine.all("SELECT value FROM meta WHERE name = ?", (f"{name} {place}",))
    return int(found[0][0]) if found else None


def listed(numbers: Sequence[int]) -> str:
    """Numbers for the inside of IN (...)."""
    return ", ".join(map(str, numbers)) or "NULL"


def state(engine: Engine, scope: Scope) -> State:
    """Where the conversation of this scope stands."""
    terms = inside(engine, scope, "number")
    turn = engine.all(f"SELECT COALESCE(MAX(turn), 0) FROM scopes{terms}")[0][0]
    own = engine.all("SELECT number, carry FROM scopes WHERE of_user = ? AND of_agent = ? AND of_run = ?", scope.parts)
    number, carry = own[0] if own else (0, 0.0)
    latest = engine.all(
        "SELECT text FROM summaries WHERE scope = ? AND kind <> 'archived' ORDER BY number DESC LIMIT 1", (number,)
    )
    archived = engine.all(
        "SELECT turn FROM summaries WHERE scope = ? AND kind = 'archived' ORDER BY number DESC LIMIT 1", (number,)
    )
    return State(
        turn=turn,
        carry=carry,
        summary=latest[0][0] if latest else "",
        removals=counter(engine, "removals"),
        archived=archived[0][0] if archived else 0,
        pruned=note(engine, PRUNED, number) or 0,
    )


def summaries(engine: Engine, scope: Scope) -> list[Summary]:
    """Every version of the summary, oldest first."""
    rows = engine.all(
        "SELECT summaries.number, kind, summaries.turn, text FROM summaries JOIN scopes ON "
        "scopes.number = summaries.scope WHERE of_user = ? AND of_agent = ? AND of_run = ? "
        "ORDER BY summaries.number",
        scope.parts,
    )
    return [Summary(number=n, kind=kind, turn=turn, text=text) for n, kind, turn, text in rows]


def memories(engine: Engine, heads: Sequence[int]) -> dict[int, Memory]:
    """Memories by the number of their head, those that exist."""
    wanted = sorted(set(heads))
    if not wanted:
        return {}
    columns = ", ".join(f"items.{name}" for name in COLUMNS)
    rows = engine.all(
        f"SELECT {columns}, of_user, of_agent, of_run FROM items JOIN scopes ON scopes.number = items.scope "
        f"WHERE head IN ({listed(wanted)}) ORDER BY head, part"
    )
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        chunk = dict(zip((*COLUMNS, "user", "agent", "run"), row, strict=True))
        found.setdefault(chunk["head"], []).append(chunk)
    return {head: _memory(chunks) for head, chunks in found.items()}


def texts_before(engine: Engine, heads: Sequence[int]) -> dict[int, list[str]]:
    """What memories said before their updates, as far as the history has it."""
    rows = engine.all(f"SELECT head, before FROM history WHERE before IS NOT NULL AND head IN ({listed(heads)})")
    found: dict[int, list[str]] = {}
    for head, before in rows:
        found.setdefault(head, []).append(text_of(unpacked(before, "")))
    return found


def partly_faded(engine: Engine, head: int) -> bool:
    """Whether any chunk of a memory has faded."""
    return bool(engine.all("SELECT 1 FROM items WHERE head = ? AND faded = 1 LIMIT 1", (head,)))


def chunks(engine: Engine, numbers: Sequence[int]) -> dict[int, tuple[int, str, int, int]]:
    """Head, text, turn and last retrieval of chunks."""
    columns = "number, head, text, turn, last_retrieved"
    rows = engine.all(f"SELECT {columns} FROM items WHERE number IN ({listed(numbers)})")
    return {number: (head, text, turn, last) for number, head, text, turn, last in rows}


def numbers(engine: Engine, heads: Sequence[int]) -> list[int]:
    """The numbers of all chunks of memories."""
    return [row[0] for row in engine.all(f"SELECT number FROM items WHERE head IN ({listed(heads)})")]


def spoken(engine: Engine, sight: Sight, turns: int, roles: Sequence[str]) -> list[Memory]:
    """What these roles said in the last turns in which they spoke, in order."""
    condition, arguments = seen(sight, scope_numbers(engine, sight.scope))
    condition += f" AND role IN ({', '.join('?' * len(roles))})"
    both = [*arguments, *roles]
    rows = engine.all(
        f"SELECT DISTINCT head FROM items WHERE {condition} AND turn IN "
        f"(SELECT DISTINCT turn FROM items WHERE {condition} ORDER BY turn DESC LIMIT ?)",
        [*both, *both, turns],
    )
    return sorted(memories(engine, [row[0] for row in rows]).values(), key=lambda m: (m.turn, int(m.identity)))


def listing(engine: Engine, sight: Sight) -> Iterator[Memory]:
    """All memories in sight, oldest first, a page at a time: no read is held open between pages."""
    condition, arguments = seen(sight, scope_numbers(engine, sight.scope))
    last = 0
    while True:
        rows = engine.all(
            f"SELECT DISTINCT head FROM items WHERE {condition} AND head > ? ORDER BY head LIMIT {PAGE}",
            [*arguments, last],
        )
        page = memories(engine, [row[0] for row in rows])
        yield from page.values()
        if len(rows) < PAGE:
            return
        last = rows[-1][0]


def history(engine: Engine, scope: Scope, identity: int | None = None) -> list[Change]:
    """What happened in the scope, oldest first; to one memory, or to all."""
    which = inside(engine, scope) + (f" AND head = {identity}" if identity is not None else "")
    rows = engine.all(f"SELECT number, event, head, at, before, reason FROM history{which} ORDER BY number")
    return [
        Change(number=n, event=event, identity=str(head), at=at, before=before, reason=reason)
        for n, event, head, at, before, reason in rows
    ]


def _memory(chunks: Sequence[Mapping[str, Any]]) -> Memory:
    """The memory of all its chunks, in order."""
    first = chunks[0]
    text = "".join(chunk["text"] for chunk in chunks)
    same = {name: first[name] for name in ("role", "turn", "happened", "written", "ended", "expires")}
    return Memory(
        identity=str(first["head"]),
        record=unpacked(first["record"], text),
        scope=Scope(**{name: first[name] or None for name in ("user", "agent", "run")}),
        successor=None if first["successor"] is None else str(first["successor"]),
        pinned=bool(first["pinned"]),
        faded=all(chunk["faded"] for chunk in chunks),
        last_retrieved=max(chunk["last_retrieved"] for chunk in chunks),
        retrieved=sum(chunk["retrieved"] for chunk in chunks),
        metadata=json.loads(first["metadata"]),
        **same,
    )
