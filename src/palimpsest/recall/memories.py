"""What a store keeps: memories with their scope and times, what a search finds, and what changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

View = Literal["current", "all"]
NEVER = -1
"""The turn of the last retrieval of what was never retrieved."""


def encodable(text: str, what: str) -> str:
    """The text; one that has no UTF-8 raises."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PalimpsestError(f"{what} holds half of a surrogate pair, which is no character. Remove it.")
    return text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """Whose memories are meant; a part that is None means any where something is looked up, none where it is added."""

    user: str | None = None
    agent: str | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        for name in ("user", "agent", "run"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise PalimpsestError(f"the scope's {name} is {value!r}, expected a name.")
            encodable(value or "", f"the scope's {name}")

    @property
    def parts(self) -> tuple[str, str, str]:
        """User, agent and run as they are stored; an empty text is none."""
        return self.user or "", self.agent or "", self.run or ""

    def covers(self, other: Scope) -> bool:
        """Whether what is stored under the other scope may be seen from this one."""
        return all(mine in ("", theirs) for mine, theirs in zip(self.parts, other.parts, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a look-up may see: a scope, the view, the present moment, and the moment that is asked about.

    The view `current` leaves out what was superseded, faded or has expired; `as_of` (seconds since 1970) goes back to
    what was current at that moment; `without` are numbers that are left out.
    """

    scope: Scope = Scope()
    view: View = "current"
    now: float = 0.0
    as_of: float | None = None
    without: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class New:
    """A chunk to be stored: part `part` of a memory. `record` is JSON where the memory is more than its text."""

    text: str
    vector: Float[np.ndarray, " width"]
    role: str = "user"
    part: int = 0
    turn: int | None = None
    happened: float = 0.0
    expires: float | None = None
    pinned: bool = False
    metadata: str = "{}"
    record: str | None = None
    ended: float | None = None
    successor: int | None = None
    faded: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One stored memory. `happened` is the time of the event, `written` that of storing it; seconds since 1970.

    `ended` is when another one (`successor`) took its place; a `faded` one is no longer found, but still there.
    """

    identity: str
    record: Record
    scope: Scope
    role: str
    turn: int
    happened: float
    written: float
    ended: float | None
    successor: str | None
    expires: float | None
    pinned: bool
    faded: bool
    last_retrieved: int
    retrieved: int
    metadata: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What is searched."""
        return text_of(self.record)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A memory that a search found: the chunk of it that was nearest, its score, and why it is here."""

    memory: Memory
    number: int
    text: str
    score: float
    why: Mapping[str, float]

    @property
    def identity(self) -> str:
        """The memory's identity."""
        return self.memory.identity

    @property
    def record(self) -> Record:
        """What was stored."""
        return self.memory.record


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One entry of the history: what happened to a memory, and its text before, unless that was forgotten."""

    number: int
    event: str
    identity: str
    at: float
    before: str | None
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """What a `forget` took away, or would: identities with the reason for each, and how many summaries changed."""

    identities: tuple[str, ...]
    reasons: Mapping[str, str]
    summaries: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A version of the compact memory: `running` of each turn, `archived` now and then, `overall` of the archived."""

    number: int
    kind: Literal["running", "archived", "overall"]
    turn: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Where a conversation stands: turns so far, the fraction of a memory still to be pruned, and its latest summary.

    `archived` and `pruned` are the turns in which that was last done. `removals` counts deletions in the whole store,
    so that a summary made of what was forgotten meanwhile is noticed.
    """

    turn: int = 0
    carry: float = 0.0
    summary: str = ""
    removals: int = 0
    archived: int = 0
    pruned: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Embedding:
    """What made the vectors of a store: encoder, width, and an identity that every re-embedding gives anew."""

    encoder: str
    width: int
    identity: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Ages:
    """What salience is computed from, for all chunks in sight."""

    number: Int[np.ndarray, " chunks"]
    turn: Int[np.ndarray, " chunks"]
    last_retrieved: Int[np.ndarray, " chunks"]
    pinned: np.ndarray


def text_of(record: Record) -> str:
    """The words of a record; one without words raises."""
    if record.text is not None:
        words = record.text
    elif record.prompt is not None:
        words = f"{record.prompt}\n{record.answer}"
    elif record.messages is not None:
        words = "\n".join(f"{message['role']}: {message['content']}" for message in record.messages)
    else:
        raise PalimpsestError("the record is an image; a conversation memory keeps text.")
    if not words.strip():
        raise PalimpsestError("the text is empty; there is nothing to remember.")
    if "\x00" in words:
        raise PalimpsestError("the text holds a NUL character, which no store keeps. Remove it.")
    return encodable(words, "the text")


def packed(record: Record) -> str | None:
    """The record as JSON; None where its text is all there is."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    filled = {name: value for name, value in fields.items() if value not in (None, ())}
    return None if set(filled) == {"text"} else encodable(json.dumps(filled, ensure_ascii=False), "the record")


def unpacked(record: str | None, text: str) -> Record:
    """The record behind its stored form."""
    return Record(text=text) if record is None else Record(**json.loads(record))


def number_of(identity: str) -> int:
    """The number behind an identity; anything else raises."""
    if not isinstance(identity, str) or not identity.isascii() or not identity.isdigit():
        raise PalimpsestError(f"there is no memory {identity!r}; identities are numbers such as '17'.")
    return int(identity)


def check_vector(vector: Any, width: int) -> Float[np.ndarray, " width"]:
    """The vector with length 1 in float32; raises where it is of another width, not finite, or zero."""
    found = np.asarray(vector, dtype=np.float64)
    if found.shape != (width,):
        raise PalimpsestError(f"the embedding has {found.size} numbers, but the store keeps vectors of {width}.")
    if not np.isfinite(found).all():
        raise PalimpsestError("the embedding holds a number that is not finite.")
    largest = float(np.abs(found).max())
    if largest == 0:
        raise PalimpsestError("the embedding is all zeros; it has no direction to compare.")
    scaled = found / largest  # so that squares neither overflow nor vanish
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)
