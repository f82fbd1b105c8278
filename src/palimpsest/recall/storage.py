"""What a durable store does, whichever database is under it: the tables, and every change as one transaction.

    items      one row a chunk; the chunks of one memory share its `head`, the number of its first chunk
    scopes     whose they are, with the turns so far and the pruning's carry
    summaries  every version of the compact memory
    history    what happened to which memory, with the text before a change
    counters   changes and removals (how other processes notice), numbers (never used twice), forgets and scrubs
    meta       encoder, width, what the engine keeps, and notes on a scope: `name number`

An engine (`sqlite_store`, `postgres_store`) brings connections, transactions, vectors and full-text search; `reading`
has the statements that change nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palimpsest.errors import PalimpsestError
from palimpsest.recall.engine import PAGE, Engine
from palimpsest.recall.memories import NEVER, Forgotten, Memory, New, Scope, State, Summary
from palimpsest.recall.reading import (
    COLUMNS,
    FREE,
    PRUNED,
    inside,
    listed,
    memories,
    note,
    scope_numbers,
    state,
    summaries,
    texts_before,
)


class MovedError(Exception):
    """Somebody else changed the conversation since its state was read."""


class Storage:
    """Every change of memories, summaries and history in one database."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def add(
        self,
        scope: Scope,
        news: Sequence[Sequence[New]],
        at: float,
        *,
        ahead: Sequence[int] = (),
        merge: bool = False,
        expected: State | None = None,
        versions: Sequence[tuple[str, str]] = (),
        extractive: bool = True,
    ) -> list[int]:
        """The heads of the memories, durable once returned. `ahead`: how many turns after the last one each happened.

        With `merge`, a current memory of the same scope and text is returned in the place of a second one. `versions`
        are summaries, `extractive` where they are made of sentences of what was said. Raises `MovedError` where the
        conversation is no longer in the `expected` state.
        """
        with self.engine.transaction():
            changed = self._bump("changes")
            self.engine.check_encoder()
            before = state(self.engine, scope)
            if expected is not None and (before.turn, before.removals) != (expected.turn, expected.removals):
                raise MovedError
            place = self._place(scope)
            turns = [before.turn + (ahead[i] if ahead else 1) for i in range(len(news))]
            heads = [
                self._same(place, chunks, at) or self._insert(place, chunks, turn, at, changed)
                if merge
                else self._insert(place, chunks, turn, at, changed)
                for chunks, turn in zip(news, turns, strict=True)
            ]
            last = max([before.turn, *turns, *(c.turn or 0 for chunks in news for c in chunks)])
            self.engine.all("UPDATE scopes SET turn = ? WHERE number = ?", (last, place))
            sql = "INSERT INTO summaries (scope, kind, turn, text) VALUES (?, ?, ?, ?) RETURNING number"
            made = [int(self.engine.all(sql, (place, kind, last, text))[0][0]) for kind, text in versions]
            if made and not extractive and note(self.engine, FREE, place) is None:
                self._note(FREE, place, made[0])
        return heads

    def supersede(self, head: int, chunks: Sequence[New], ended: float, at: float) -> int:
        """Stores a memory in the place of another, which stays with the time when it ended and its successor."""
        with self.engine.transaction():
            old = self._known(head)
            (successor,) = self.add(old.scope, [chunks], at)
            self.mark([head], "superseded", at, f"by {successor}", ended=ended, successor=successor)
        return successor

    def replace(self, head: int, chunks: Sequence[New], at: float) -> None:
        """Puts other chunks into the place of a memory's; its text before is kept in the history."""
        with self.engine.transaction():
            changed = self._bump("changes")
            self.engine.check_encoder()
            old = self._known(head)
            place = self.engine.all("SELECT scope FROM items WHERE head = ? LIMIT 1", (head,))[0][0]
            numbers = [row[0] for row in self.engine.all("SELECT number FROM items WHERE head = ?", (head,))]
            self.engine.drop_chunks(numbers)
            self.engine.all("DELETE FROM items WHERE head = ?", (head,))
            self._bump("removals")
            self._insert(place, chunks, old.turn, at, changed, head=head)
            self._log("updated", head, place, at, before=_told(old))

    def mark(self, heads: Sequence[int], event: str, at: float, reason: str = "", **columns: Any) -> None:
        """Sets columns of memories: `pinned`, `expires`, `metadata`, `faded`, `ended` with `successor`."""
        with self.engine.transaction():
            changed = self._bump("changes")
            for head in self._all_known(heads):
                place = self.engine.all("SELECT scope FROM items WHERE head = ? LIMIT 1", (head,))[0][0]
                sets = ", ".join(f"{name} = ?" for name in columns)
                self.engine.all(
                    f"UPDATE items SET {sets}, changed = ? WHERE head = ?", [*columns.values(), changed, head]
                )
                self._log(event, head, place, at, reason=reason)

    def fade(self, scope: Scope, reasons: Mapping[int, str], carry: float, turn: int, at: float) -> None:
        """Takes chunks out of sight, and keeps the fraction of one that is still due; they stay in the database."""
        numbers = list(reasons)
        with self.engine.transaction():
            changed = self._bump("changes")
            place = self._place(scope)
            self.engine.all("UPDATE scopes SET carry = ? WHERE number = ?", (carry, place))
            self._note(PRUNED, place, turn)
            self.engine.many(
                "UPDATE items SET faded = 1, changed = ? WHERE number = ?", [(changed, number) for number in numbers]
            )
            self.engine.many(
                "INSERT INTO history (event, head, scope, at, before, reason) "
                "SELECT 'faded', head, scope, ?, NULL, ? FROM items WHERE number = ?",
                [(at, reasons[number], number) for number in numbers],
            )

    def touch(self, numbers: Sequence[int], turn: int) -> None:
        """Notes that chunks were retrieved; the one change that a power cut may undo."""
        with self.engine.transaction(durable=False):
            changed = self._bump("changes")
            self.engine.many(
                "UPDATE items SET last_retrieved = ?, retrieved = retrieved + 1, changed = ? WHERE number = ?",
                [(turn, changed, number) for number in numbers],
            )

    def remove(
        self,
        reasons: Mapping[int, str],
        at: float,
        rewrite: Callable[[Summary, Sequence[str]], str | None] | None = None,
    ) -> Forgotten:
        """Deletes memories for good: rows, vectors, words, the texts in their history, and what summaries kept.

        `rewrite(summary, texts)` gives the new text of a summary that may hold some of the texts, or None to drop it. A
        summary that is not made of sentences of what was said, or comes after one, is dropped in any case.
        """
        rewritten = 0
        with self.engine.transaction():
            self._bump("changes")
            known = self._all_known(list(reasons))
            first: dict[Scope, int] = {}
            gone: dict[Scope, list[str]] = {}
            before = texts_before(self.engine, list(known))
            for head, memory in known.items():
                first[memory.scope] = min(first.get(memory.scope, memory.turn), memory.turn)
                gone.setdefault(memory.scope, []).extend([memory.text, *before.get(head, [])])
            self._delete(list(known), reasons, at)
            for scope, turn in first.items():
                free = note(self.engine, FREE, self._place(scope))
                for summary in summaries(self.engine, scope):
                    if rewrite is None or summary.turn < turn:
                        continue
                    quoted = free is None or summary.number < free
                    text = rewrite(summary, gone[scope]) if quoted else None
                    if text != summary.text:
                        rewritten += 1
                        if text is None:
                            self.engine.all("DELETE FROM summaries WHERE number = ?", (summary.number,))
                        else:
                            self.engine.all("UPDATE summaries SET text = ? WHERE number = ?", (text, summary.number))
        self.engine.scrub()
        return Forgotten(
            identities=tuple(str(head) for head in reasons),
            reasons={str(head): reason for head, reason in reasons.items()},
            summaries=rewritten,
        )

    def remove_scope(self, scope: Scope) -> int:
        """Deletes everything of all scopes that the scope covers, its history and its name included; how many."""
        with self.engine.transaction():
            self._bump("changes")
            covered = scope_numbers(self.engine, scope)
            if not covered:
                raise PalimpsestError(f"nothing is stored for {_named(scope)}.")
            inner = listed(covered)
            heads = [row[0] for row in self.engine.all(f"SELECT DISTINCT head FROM items WHERE scope IN ({inner})")]
            self._delete(heads, {}, 0.0)
            for table in ("history", "summaries"):
                self.engine.all(f"DELETE FROM {table} WHERE scope IN ({inner})")
            self.engine.all(f"DELETE FROM scopes WHERE number IN ({inner})")
            notes = [(f"{name} {place}",) for name in (FREE, PRUNED) for place in covered]
            self.engine.many("DELETE FROM meta WHERE name = ?", notes)
        self.engine.scrub()
        return len(heads)

    def purge_history(self, scope: Scope, before: float | None = None) -> int:
        """Deletes the scope's history for good, all of it or what is older than a moment; how many entries."""
        with self.engine.transaction():
            which, arguments = inside(self.engine, scope), list[Any]()
            if before is not None:
                which, arguments = f"{which} AND at < ?", [before]
            count = self.engine.all(f"SELECT COUNT(*) FROM history{which}", arguments)[0][0]
            self.engine.all(f"DELETE FROM history{which}", arguments)
            self._bump("forgets")
        self.engine.scrub()
        return int(count)

    # --- inside a transaction ----------------------------------------------------------------------------------------

    def _bump(self, counter: str, by: int = 1) -> int:
        sql = "UPDATE counters SET value = value + ? WHERE name = ? RETURNING value"
        return int(self.engine.all(sql, (by, counter))[0][0])

    def _note(self, name: str, place: int, value: int) -> None:
        sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        self.engine.all(sql, (f"{name} {place}", str(value)))

    def _place(self, scope: Scope) -> int:
        """The number of the scope, made where it is new."""
        parts = scope.parts
        sql = "SELECT number FROM scopes WHERE of_user = ? AND of_agent = ? AND of_run = ?"
        if not (found := self.engine.all(sql, parts)):
            number = self._bump("numbers")
            self.engine.all(
                "INSERT INTO scopes (number, of_user, of_agent, of_run, turn, carry) VALUES (?, ?, ?, ?, 0, 0.0)",
                (number, *parts),
            )
            return number
        return int(found[0][0])

    def _same(self, place: int, chunks: Sequence[New], at: float) -> int | None:
        """The head of a current memory of the scope with exactly this text."""
        found = self.engine.all(
            "SELECT head FROM items WHERE scope = ? AND digest = ? AND ended IS NULL "
            "AND (expires IS NULL OR expires > ?) AND EXISTS "
            "(SELECT 1 FROM items AS part WHERE part.head = items.head AND part.faded = 0) ORDER BY head LIMIT 1",
            (place, _digest(chunks), at),
        )
        if not found:
            return None
        self._log("repeated", found[0][0], place, at)
        return int(found[0][0])

    def _insert(
        self, place: int, chunks: Sequence[New], turn: int, at: float, changed: int, head: int | None = None
    ) -> int:
        first = self._bump("numbers", len(chunks)) - len(chunks) + 1
        numbers = list(range(first, first + len(chunks)))
        logged, head = head is None, first if head is None else head
        digest = _digest(chunks)
        rows = []
        for number, c in zip(numbers, chunks, strict=True):
            own: dict[str, Any] = {
                "number": number,
                "head": head,
                "scope": place,
                "turn": turn if c.turn is None else c.turn,
            }
            own |= {"written": at, "last_retrieved": NEVER, "retrieved": 0, "changed": changed}
            own |= {"digest": digest if c.part == 0 else None, "cell": None}
            own |= {name: int(getattr(c, name)) for name in ("pinned", "faded")}
            rows.append([own[name] if name in own else getattr(c, name) for name in COLUMNS])
        marks = ", ".join("?" * len(COLUMNS))
        self.engine.many(f"INSERT INTO items ({', '.join(COLUMNS)}) VALUES ({marks})", rows)
        self.engine.put_chunks(numbers, chunks)
        if logged:
            self._log("added", head, place, at)
        return head

    def _delete(self, heads: Sequence[int], reasons: Mapping[int, str], at: float) -> None:
        for start in range(0, len(heads), PAGE):
            inner = listed(heads[start : start + PAGE])
            numbers = [row[0] for row in self.engine.all(f"SELECT number FROM items WHERE head IN ({inner})")]
            self.engine.drop_chunks(numbers)
            self.engine.all(f"UPDATE history SET before = NULL WHERE head IN ({inner})")
            for head in heads[start : start + PAGE]:
                if head in reasons:
                    place = self.engine.all("SELECT scope FROM items WHERE head = ? LIMIT 1", (head,))[0][0]
                    self._log("forgotten", head, place, at, reason=reasons[head])
            self.engine.all(f"DELETE FROM items WHERE head IN ({inner})")
        self._bump("removals")
        self._bump("forgets")

    def _log(self, event: str, head: int, place: int, at: float, before: str | None = None, reason: str = "") -> None:
        self.engine.all(
            "INSERT INTO history (event, head, scope, at, before, reason) VALUES (?, ?, ?, ?, ?, ?)",
            (event, head, place, at, before, reason),
        )

    def _known(self, head: int) -> Memory:
        return self._all_known([head])[head]

    def _all_known(self, heads: Sequence[int]) -> dict[int, Memory]:
        found = memories(self.engine, heads)
        for head in heads:
            if head not in found:
                raise PalimpsestError(f"there is no memory {head} in {self.engine.name}.")
        return found


def _digest(chunks: Sequence[New]) -> str:
    return hashlib.sha256("".join(chunk.text for chunk in chunks).encode()).hexdigest()


def _told(memory: Memory) -> str:
    """The text of a memory, with what else its record holds, as the history keeps it."""
    fields = {f.name: getattr(memory.record, f.name) for f in dataclasses.fields(memory.record)}
    return json.dumps({name: value for name, value in fields.items() if value not in (None, ())}, ensure_ascii=False)


def _named(scope: Scope) -> str:
    parts = [f"{name} {part!r}" for name, part in zip(("user", "agent", "run"), scope.parts, strict=True) if part]
    return ", ".join(parts) or "anybody"
