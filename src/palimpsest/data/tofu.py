"""TOFU: 200 fictitious authors with 20 questions each, the last 1, 5 or 10 % of whom are to be forgotten.

Source: Maini et al. 2024 (arXiv 2401.06121), on the hub as `locuslab/TOFU`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from palimpsest.data.loading import load_records
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError, nearest

HUB_NAME = "locuslab/TOFU"
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
ROWS_PER_AUTHOR = 20

_CAPITALISED = r"[^\W\d_a-zà-öø-ÿ][\w]*(?:[-'’]\w+)*"
_PARTICLE = r"(?:van|von|der|den|de|da|del|dos|di|bin|ibn|al)"
_NAME = re.compile(rf"{_CAPITALISED}(?:\s+(?:{_PARTICLE}\s+)*{_CAPITALISED})*")


def tofu(
    split: str = "forget05",
    source: str | Path | None = None,
    authors: int | None = None,
    forget_authors: int | None = None,
) -> Roles:
    """All roles of a TOFU split, from a folder of its JSON files or else from the hub.

    `authors` keeps that many retain authors, the nearest before the forget set; `forget_authors` keeps the last ones of
    the forget set. `retain_probe` has the retain records with paraphrases: those of the first 20 authors, as published,
    or, where `authors` is given, of whichever kept authors have them (`forget10_perturbed` covers the last 20 authors,
    so `forget01` and `forget05` have them nearby); the role is left out where none do.
    """
    if split not in RETAIN_OF:
        raise PalimpsestError(f'TOFU has no split "{split}". {nearest(split, RETAIN_OF)}')
    retain = _read(source, RETAIN_OF[split])
    everyone = with_subjects(retain + _read(source, split))
    retain, forget = everyone[: len(retain)], everyone[len(retain) :]
    probes = _read(source, "retain_perturbed")
    if authors is not None:
        retain = _last_authors(retain, authors, "authors")
        probes += _read(source, "forget10_perturbed")
    if forget_authors is not None:
        forget = _last_authors(forget, forget_authors, "forget_authors")
    forget = merged(forget, _read(source, f"{split}_perturbed"))
    retain_probe = [record for record in merged(retain, probes) if record.paraphrase]
    if not any(record.paraphrase for record in forget):
        raise _no_partners(f"{split}_perturbed", split)
    if authors is None and not retain_probe:
        raise _no_partners("retain_perturbed", RETAIN_OF[split])
    return Roles(
        train=forget + retain,
        forget=forget,
        retain=retain,
        retain_probe=retain_probe or None,
        real=_read(source, "real_authors_perturbed"),
        world=_read(source, "world_facts_perturbed"),
    )


def with_subjects(records: Sequence[Record]) -> list[Record]:
    """The records, which come in blocks of 20 about one author each, with that author's name as their subject."""
    named = []
    for start in range(0, len(records), ROWS_PER_AUTHOR):
        block = records[start : start + ROWS_PER_AUTHOR]
        subject = author_name(block) or f"author {start // ROWS_PER_AUTHOR:03}"
        named += [dataclasses.replace(record, subject=subject) for record in block]
    return named


def author_name(block: Sequence[Record]) -> str | None:
    """The longest proper name of two words or more that most records of a block share."""
    counts = Counter(name for record in block for name in _names_in(f"{record.prompt} \n{record.answer}"))
    most = max(counts.values(), default=0)
    if 2 * most < len(block):
        return None
    # Not only the most frequent: a record or two may leave out a part of the name.
    frequent = [name for name, count in counts.items() if 4 * count >= 3 * most]
    return max(frequent, key=lambda name: (len(name.split()), counts[name], name))


def merged(records: Sequence[Record], perturbed: Sequence[Record]) -> list[Record]:
    """The records with the measuring fields of the perturbed row that has the same question and answer, if any."""
    # By the answer too: "What is the full name of the author?" is asked about two of the authors.
    found = {record.key: record for record in perturbed}
    return [
        dataclasses.replace(
            record,
            paraphrase=found[record.key].paraphrase,
            wrong=found[record.key].wrong,
            paraphrased_prompt=found[record.key].paraphrased_prompt,
        )
        if record.key in found
        else record
        for record in records
    ]


def _names_in(text: str) -> set[str]:
    text = re.sub(r"[’']s\b|\s\([^)]*\)", "", text)
    names = set()
    for run in _NAME.findall(text):
        words = run.split()
        capitalised = [i for i, word in enumerate(words) if not re.fullmatch(_PARTICLE, word)]
        names |= {" ".join(words[i : j + 1]) for i in capitalised for j in capitalised if i < j}
    return names


def _last_authors(records: list[Record], count: int, argument: str) -> list[Record]:
    available = len(records) // ROWS_PER_AUTHOR
    if not 0 < count <= available:
        raise PalimpsestError(f"{argument} is {count}; this split has {available}, so it must be 1 to {available}.")
    return records[-count * ROWS_PER_AUTHOR :]


def _no_partners(perturbed: str, name: str) -> PalimpsestError:
    return PalimpsestError(f"{perturbed} has no question of {name}. Take both from the same copy of TOFU.")


def _read(source: str | Path | None, name: str) -> list[Record]:
    if source is None:
        return load_records(HUB_NAME, config=name)
    folder = Path(source).expanduser()
    path = folder / f"{name}.json"
    if not path.is_file():
        raise PalimpsestError(f"{folder}: {path.name} is missing. Copy it from {HUB_NAME}, or leave out the source.")
    return load_records(path)
