"""The memories of one scope in a store: add, find, correct, forget, and what happened to them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.recall import finding, reading
from palimpsest.recall.chunks import chunks
from palimpsest.recall.memories import (
    Change,
    Forgotten,
    Memory,
    New,
    Scope,
    Sight,
    State,
    Summary,
    View,
    check_vector,
    encodable,
    number_of,
    packed,
    text_of,
)
from palimpsest.recall.opening import Opened

Rewrite = Callable[[Summary, Sequence[str]], str | None]
"""A summary without texts that are forgotten; None drops it."""
Gate = Callable[[Record], Record]
"""What a record is to be stored as, its private parts taken out, say; raises where it must not be stored at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """What of a store belongs to a scope. Nothing outside it is found, changed or forgotten."""

    opened: Opened
    scope: Scope
    rewrite: Rewrite
    chunk_tokens: int = 256
    repeated: Literal["merge", "keep"] = "merge"
    gate: Gate | None = None

    def sight(self, view: View = "current", **how: Any) -> Sight:
        """What is seen now."""
        return Sight(scope=self.scope, view=view, now=time.time(), **how)

    # --- adding ------------------------------------------------------------------------------------------------------

    def add(
        self,
        records: Sequence[Record],
        *,
        vectors: Any = None,
        metadata: Mapping[str, Any] | None = None,
        expires: float | None = None,
        **about: Any,
    ) -> list[str]:
        """Stores records in one transaction, each as a turn of its own; `about` as in `news`."""
        if vectors is not None and len(vectors) != len(records):
            raise PalimpsestError(f"{len(records)} records come with {len(vectors)} vectors.")
        if expires is not None and expires <= time.time():
            raise PalimpsestError(f"expires is {expires}, which is past.")
        about |= {"metadata": as_json(metadata), "expires": expires}
        given = [None] * len(records) if vectors is None else vectors
        made = [self.news(record, vector=vector, **about) for record, vector in zip(records, given, strict=True)]
        ahead, merge = range(1, len(records) + 1), self.repeated == "merge"
        heads = self.opened.storage.add(self.scope, made, time.time(), ahead=ahead, merge=merge)
        return [str(head) for head in heads]

    def news(
        self, record: Record, *, vector: Any = None, happened: float | None = None, role: str = "note", **about: Any
    ) -> list[New]:
        """The chunks of a record with their vectors; `vector` where it is known. Times are seconds since 1970."""
        record = record if self.gate is None else self.gate(record)
        text = text_of(record)
        if vector is not None:
            parts, vectors = [text], [check_vector(vector, self.opened.width)]
        else:
            parts = chunks(text, self.chunk_tokens, self.opened.encoder.lengths)
            vectors = self.opened.encode(parts)
        about |= {"happened": time.time() if happened is None else happened, "role": role, "record": packed(record)}
        return [New(text=p, vector=v, part=i, **about) for i, (p, v) in enumerate(zip(parts, vectors, strict=True))]

    # --- looking up --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Turns so far, and the summary."""
        return reading.state(self.opened.engine, self.scope)

    def get(self, identity: str) -> Memory:
        """One memory; one that is not there, or of another scope, raises."""
        number = number_of(identity)
        found = reading.memories(self.opened.engine, [number]).get(number)
        if found is None or not self.scope.covers(found.scope):
            raise PalimpsestError(f"there is no memory {identity} of {self.scope.user!r} in {self.opened.engine.name}.")
        return found

    def all(self, view: View = "current") -> list[Memory]:
        """All memories in sight, oldest first."""
        return list(reading.listing(self.opened.engine, self.sight(view)))

    def numbers(self, identities: Sequence[str]) -> list[int]:
        """The numbers of all chunks of memories."""
        return reading.numbers(self.opened.engine, [number_of(identity) for identity in identities])

    def summaries(self) -> list[Summary]:
        """Every version of the compact memory, oldest first."""
        return reading.summaries(self.opened.engine, self.scope)

    def history(self, identity: str | None = None) -> list[Change]:
        """Every change, oldest first; of one memory, or of all."""
        number = None if identity is None else number_of(identity)
        return reading.history(self.opened.engine, self.scope, number)

    def chosen(self, **what: Any) -> dict[str, str]:
        """Identities with reasons of what a deletion request means; see `finding.chosen`."""
        return finding.chosen(self, **what)

    # --- changing ----------------------------------------------------------------------------------------------------

    def update(self, identity: str, record: Record) -> None:
        """Replaces a memory; the history keeps what it was."""
        old = self.get(identity)
        kept: dict[str, Any] = {
            "role": old.role,
            "metadata": as_json(old.metadata),
            "expires": old.expires,
            "pinned": old.pinned,
        }
        successor = None if old.successor is None else int(old.successor)
        kept |= {"ended": old.ended, "successor": successor, "faded": old.faded}
        self.opened.storage.replace(int(identity), self.news(record, happened=old.happened, **kept), time.time())

    def undo(self, identity: str) -> None:
        """Puts back what a memory was before its last update."""
        self.get(identity)
        before = [change.before for change in self.history(identity) if change.before is not None]
        if not before:
            raise PalimpsestError(f"memory {identity} was never updated, or its history is purged.")
        self.update(identity, Record(**json.loads(before[-1])))

    def supersede(self, identity: str, record: Record, *, happened: float | None = None) -> str:
        """Stores what holds now; the old memory is found with the view `all`, or `as_of` a time before."""
        old, now = self.get(identity), time.time()
        if old.ended is not None:
            raise PalimpsestError(f"memory {identity} was superseded by {old.successor} already.")
        new = self.news(record, role=old.role, metadata=as_json(old.metadata), happened=happened)
        return str(self.opened.storage.supersede(int(identity), new, now if happened is None else happened, now))

    def set(self, identity: str, **columns: Any) -> None:
        """Changes `pinned`, `expires` (seconds since 1970, None for never) or `metadata` of a memory."""
        self.get(identity)
        if not columns or set(columns) - {"pinned", "expires", "metadata"}:
            raise PalimpsestError(f"set takes pinned, expires and metadata (given: {', '.join(columns) or 'none'}).")
        named = ", ".join(columns)
        if "metadata" in columns:
            columns["metadata"] = as_json(columns["metadata"])
        if "pinned" in columns:
            columns["pinned"] = int(columns["pinned"])
        self.opened.storage.mark([int(identity)], "set", time.time(), named, **columns)

    def restore(self, identity: str) -> None:
        """Brings a faded memory back, or the parts of it that have faded."""
        self.get(identity)
        if not reading.partly_faded(self.opened.engine, int(identity)):
            raise PalimpsestError(f"memory {identity} has not faded.")
        self.opened.storage.mark([int(identity)], "restored", time.time(), faded=0)

    def forget(self, reasons: Mapping[str, str], *, dry_run: bool = False) -> Forgotten:
        """Deletes memories for good, by identity with a reason each."""
        if not reasons:
            raise PalimpsestError("nothing was named to forget.")
        for identity in reasons:
            self.get(identity)
        if dry_run:
            return Forgotten(identities=tuple(reasons), reasons=dict(reasons))
        named = {number_of(identity): encodable(reason, "the reason") for identity, reason in reasons.items()}
        return self.opened.storage.remove(named, time.time(), self.rewrite)

    def forget_all(self) -> int:
        """Deletes everything of the scope, its history and its name included; how many memories."""
        return self.opened.storage.remove_scope(self.scope)

    def purge_history(self, before: float | None = None) -> int:
        """Deletes the history for good, all or what is older than a moment; how many entries."""
        return self.opened.storage.purge_history(self.scope, before)


def as_json(metadata: Mapping[str, Any] | None) -> str:
    """Metadata as it is stored; values that JSON does not have raise."""
    try:
        text = json.dumps(dict(metadata or {}), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PalimpsestError(f"the metadata cannot be stored: {error}.") from error
    return encodable(text, "the metadata")
