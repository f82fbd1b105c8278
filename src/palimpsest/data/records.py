"""Records with roles: what a model may remember, and which part each record plays.

A record is a text, a prompt with an answer, a chat, or an image with a label or caption. `subject` says whom or what it
is about, which is what a deletion request names. `paraphrase`, `wrong` and `paraphrased_prompt` exist for measuring
only: other words for the same answer, well-formed false answers, other words for the same question.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

from palimpsest.errors import PalimpsestError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One thing a model may remember."""

    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    image: Any = None
    label: int | None = None
    subject: str | None = None
    paraphrase: str | None = None
    wrong: tuple[str, ...] = ()
    paraphrased_prompt: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.wrong, str):
            raise PalimpsestError('field "wrong" must be a list of texts, not a text: put it into a list')
        object.__setattr__(self, "wrong", tuple(self.wrong or ()))
        if self.messages is not None:
            object.__setattr__(self, "messages", tuple(dict(message) for message in self.messages))
        if (self.prompt is None) != (self.answer is None):
            missing = "answer" if self.answer is None else "prompt"
            raise PalimpsestError(f'field "{missing}" is missing (a prompt and its answer go together)')
        if self.text is None and self.prompt is None and self.messages is None and self.image is None:
            raise PalimpsestError("a record needs a text, a prompt with an answer, messages, or an image")

    @property
    def key(self) -> str:
        """What makes two records the same thing to remember: their content without the measuring fields."""
        content = ("text", "prompt", "answer", "messages", "image", "label")
        return _canonical({name: getattr(self, name) for name in content})

    @property
    def title(self) -> str:
        """A few words by which a person recognises the record."""
        whole = self.prompt or self.text or (self.messages[0]["content"] if self.messages else "an image")
        return whole if len(whole) <= 80 else whole[:77] + "..."


FIELDS = {field.name for field in dataclasses.fields(Record)}
RecordLike = Record | Mapping[str, Any]


def as_records(rows: Iterable[RecordLike], *, where: str = "record") -> list[Record]:
    """Records from dictionaries, rows of a `datasets.Dataset` or a data frame, or records.

    Columns are named as in files (see `load_records`); others are left out.
    """
    from palimpsest.data.rows import record_of

    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    if isinstance(rows, str | PurePath | Record | Mapping) or not isinstance(rows, Iterable):
        raise PalimpsestError(
            f"{where} 1: expected a list of records, found one {type(rows).__name__}"
            + (" (load_records reads files)." if isinstance(rows, str | PurePath) else ": put it into a list.")
        )
    records = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Record | Mapping):
            raise PalimpsestError(f"{where} {number}: expected a Record or a dictionary, found {row!r:.60}.")
        records.append(row if isinstance(row, Record) else record_of(row, f"{where} {number}"))
    return records


ROLES = ("train", "forget", "retain", "holdout", "world", "real", "general", "validation", "test")
"""The roles that systems and audits know."""


class Roles(Mapping[str, list[Record]]):
    """Lists of records by role, also as attributes: `Roles(forget=[...], retain=[...]).forget`.

    Roles that systems and audits know: `train` (all that is to be learned), `forget`, `retain`, `holdout` (like the
    forget records, never trained on), `world` and `real` (facts that no method ever sees), `general` (neutral text),
    `validation`, `test` (like the retain records, never trained on). Where `<role>_probe` exists, audits measure on it
    instead of on `<role>`. Other names are allowed; one that is nearly a known one raises.
    """

    def __init__(self, **roles: Iterable[RecordLike] | None) -> None:
        for name in roles:
            meant = get_close_matches(name.removesuffix("_probe"), ROLES, 1, cutoff=0.8)
            if meant and not re.match(rf"({'|'.join(ROLES)})(_|\d|$)", name):
                raise PalimpsestError(f'there is no role {name!r}. Did you mean "{meant[0]}"?')
        self._roles = {
            name: as_records(rows, where=f"role {name}, record") for name, rows in roles.items() if rows is not None
        }

    def __getitem__(self, role: str) -> list[Record]:
        return self._roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __getattr__(self, role: str) -> list[Record]:
        if role.startswith("_"):
            raise AttributeError(role)
        return self.require(role)

    def __repr__(self) -> str:
        return "Roles(" + ", ".join(f"{name}={len(rows)} records" for name, rows in self.items()) + ")"

    def require(self, role: str, by: str = "this") -> list[Record]:
        """The records of a role; raises where the role is missing or empty."""
        if role not in self._roles:
            raise PalimpsestError(f'{by} needs the role "{role}" (given: {", ".join(self) or "none"}).')
        if not self._roles[role]:
            raise PalimpsestError(f"the {role} set is empty.")
        return self._roles[role]

    def probe(self, role: str) -> list[Record]:
        """The records on which audits measure a role: `<role>_probe` where given, else the role; may be empty."""
        return self._roles.get(f"{role}_probe", self._roles.get(role, []))

    def replace(self, **roles: Iterable[RecordLike] | None) -> Roles:
        """A copy with some roles changed; a role set to None is dropped."""
        return Roles(**{**self._roles, **roles})

    def digest(self) -> dict[str, str]:
        """SHA-256 of the records of each role, in order."""
        return {name: digest(rows) for name, rows in self.items()}


def digest(records: Sequence[Record]) -> str:
    """SHA-256 over the records, in order, as canonical JSON lines."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(_canonical(dataclasses.asdict(record)).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_image_digest)


def _image_digest(image: Any) -> str:
    if not hasattr(image, "tobytes"):  # a tensor
        image = image.detach().cpu().numpy()
    return hashlib.sha256(image.tobytes()).hexdigest()


def check_disjoint(first: Sequence[Record], second: Sequence[Record], names: tuple[str, str]) -> None:
    """Raises where two roles share records, naming how many and the first."""
    keys = {record.key for record in first}
    shared = [record for record in second if record.key in keys]
    if shared:
        a, b = names
        many = f"{len(shared)} record{'s' if len(shared) > 1 else ''}"
        raise PalimpsestError(f'{a} and {b} share {many} (first: "{shared[0].title}"). Remove from one of the two.')


def by_subject(records: Iterable[RecordLike], subject: str | Sequence[str]) -> tuple[list[Record], list[Record]]:
    """The records about the subject (or any of several), and the others; a subject nowhere in the data raises."""
    records = as_records(records)
    wanted = [subject] if isinstance(subject, str) else list(subject)
    known = {record.subject for record in records if record.subject}
    for name in wanted:
        if name not in known:
            raise PalimpsestError(f"no record is about the subject {name!r}. {nearest(name, known)}")
    chosen = set(wanted)
    return [r for r in records if r.subject in chosen], [r for r in records if r.subject not in chosen]
