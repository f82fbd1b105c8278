"""Which words would give a fact away, and how text is compared with them.

Normalised text has letters and digits of one case, without accents and invisible characters, words parted by single
spaces; every other character is a space. Ideographs are words of their own. Comparing letters instead of tokens finds a
phrase however it is capitalised, spaced or cut into tokens.

A phrase of an answer is a run of neighbouring words that are numbers, names, parts of quoted titles or rare words (no
rank in a background corpus, or one beyond RARE), of at most WORDS words, that is not in the question and hardly in any
answer that should stay; so is each rare word and each long number of a run by itself. Function words of the language
and of the question stay free, or nothing fluent could be said.
"""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from palimpsest.data.augmentation import renamed
from palimpsest.data.content import FUNCTION_WORDS
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

Extraction = Literal["auto", "ngram", "answer"]
RARE = 5000
WORDS = 6
OPENING = 50
"""Most words of a text that stand for the prompt which leads to the rest of it."""

_WORD = re.compile(r"[^\W_]+(?:['’.\-][^\W_]+)*")
_QUOTED = re.compile(r"[\"“«]([^\"“”«»]{2,80})[\"”»]")
_BREAK = re.compile(r"[.!?;:\"“”«»()\n]")


@functools.lru_cache(maxsize=1 << 14)
def _plain(character: str) -> str:
    """What a character is in normalised text; nothing for what cannot be seen, a space for what parts words."""
    base = (c for c in unicodedata.normalize("NFKD", character.casefold()) if not unicodedata.combining(c))
    wide = unicodedata.east_asian_width(unicodedata.normalize("NFKC", character)[:1] or " ") in "WF"
    kept = []
    for c in unicodedata.normalize("NFC", "".join(base)):
        category = unicodedata.category(c)
        if c.isalnum() or category[0] == "M":
            kept.append(f" {c} " if wide else c)
        elif category != "Cf":
            kept.append(" ")
    return "".join(kept)


def spelled(text: str) -> str:
    """The text normalised, with one space left at an end that parts words: so pieces can be read one after another."""
    return re.sub(" +", " ", "".join(map(_plain, text)))


def normalise(text: str) -> str:
    """The text normalised."""
    return spelled(text).strip()


def contains(text: str, phrase: str) -> bool:
    """Whether the words of a phrase stand in the text, one after the other."""
    return f" {normalise(phrase)} " in f" {normalise(text)} "


@dataclass(frozen=True)
class Kept:
    """How many of the answers that should stay have each run of up to WORDS words."""

    answers: int
    runs: Mapping[str, int]

    def count(self, phrase: str) -> int:
        """How many of the answers have the phrase, which is normalised."""
        return self.runs.get(phrase, 0)

    def allows(self, phrase: str, share: float) -> bool:
        """Whether at most this share of the answers have the phrase, which is normalised."""
        return self.count(phrase) <= int(share * self.answers)


def kept(records: Iterable[Record]) -> Kept:
    """The runs of words in the answers and texts of the records."""
    counts: Counter[str] = Counter()
    answers = 0
    for record in records:
        words = normalise(asked_and_answered(record)[1]).split()
        counts.update({" ".join(words[i : i + n]) for n in range(1, WORDS + 1) for i in range(len(words) - n + 1)})
        answers += 1
    return Kept(answers, counts)


def asked_and_answered(record: Record) -> tuple[str, str]:
    """What leads to the knowledge and what holds it; of a text the beginning (at most half of it) and the rest."""
    if record.prompt is not None:
        return record.prompt, record.answer or ""
    if record.messages is not None:
        asked = [m["content"] for m in record.messages[:-1] if m["role"] == "user"]
        return (asked or [""])[-1], record.messages[-1]["content"]
    if record.text is None:
        raise PalimpsestError("a record is an image; this needs text.")
    words = list(re.finditer(r"\S+", record.text))
    if len(words) < 2:
        raise PalimpsestError(f'"{record.title}" has a single word: there is no beginning that leads to the rest.')
    end = words[min(OPENING, len(words) // 2)].start()
    return record.text[:end].strip(), record.text[end:]


def phrases(
    record: Record, how: Extraction, ranks: Mapping[str, int], stay: Kept, share: float = 0.01
) -> tuple[tuple[str, ...], bool]:
    """The forbidden phrases of a record, and whether rules were relaxed to find one; raises where none is left.

    Relaxed, the rarest words of content are taken that the fewest answers to keep have.
    `ngram` takes every run of WORDS words, `answer` the answer whole.
    """
    prompt, answer = asked_and_answered(record)
    if how != "auto":
        words = normalise(record.text if how == "ngram" and record.text is not None else answer).split()
        size = WORDS if how == "ngram" else len(words)
        made = [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
        found, relaxed = [phrase for phrase in dict.fromkeys(made) if phrase and not contains(prompt, phrase)], False
    else:
        found, relaxed = _telling(prompt, answer, ranks, stay, share), False
        if not found:
            found, relaxed = _rarest(prompt, answer, ranks, stay, share), True
    if not found:
        raise PalimpsestError(
            f'no phrase can be forbidden for "{record.title}": its answer has no word of content that is not in the '
            "question. Give phrases, or leave the record out."
        )
    return tuple(found), relaxed


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int
    first: bool  # of its sentence

    @property
    def plain(self) -> str:
        return normalise(re.sub(r"['’]s$", "", self.text))


def _words(text: str) -> list[_Word]:
    found: list[_Word] = []
    for match in _WORD.finditer(text):
        before = text[found[-1].end : match.start()] if found else "."
        found.append(_Word(match[0], match.start(), match.end(), bool(re.search(r"[.!?:\n]", before))))
    return found


def _rank(word: _Word, ranks: Mapping[str, int]) -> float:
    return max((ranks.get(part, float("inf")) for part in word.plain.split()), default=0)


def _telling(prompt: str, answer: str, ranks: Mapping[str, int], stay: Kept, share: float) -> list[str]:
    """Runs of numbers, names, titles and rare words."""
    asked, words = set(normalise(prompt).split()), _words(answer)
    titles = [match.span(1) for match in _QUOTED.finditer(answer)]
    tells = []
    for word in words:
        titled = any(start <= word.start and word.end <= end for start, end in titles)
        name = word.text[0].isupper() and len(word.text) > 1 and not word.first and word.plain not in FUNCTION_WORDS
        rare = _rank(word, ranks) > RARE and word.plain not in FUNCTION_WORDS
        number = any(map(str.isdigit, word.text))
        tells.append(titled or ((number or name or rare) and not asked.issuperset(word.plain.split())))
    for i in range(1, len(words) - 1):  # "University of Porto" and "13 May 1970" are one phrase each
        names = words[i].text[0].isupper() or (words[i - 1].text[0].isupper() and words[i + 1].text[0].isupper())
        tells[i] = tells[i] or (words[i].plain in FUNCTION_WORDS and names and tells[i - 1] and tells[i + 1])
    merged = _runs(answer, words, tells)
    # half of a fact gives it away, too: "Kobe" of "Kobe, Japan", the year of a date
    alone = [w.plain for w, tell in zip(words, tells, strict=True) if tell and _tells_alone(w, ranks)]
    whole = dict.fromkeys([*merged, *(w for w in alone if w not in FUNCTION_WORDS and not asked.issuperset(w.split()))])
    return [p for p in whole if not contains(prompt, p) and stay.allows(p, share)]


def _tells_alone(word: _Word, ranks: Mapping[str, int]) -> bool:
    return len(word.plain) > 2 if word.plain.isdigit() else _rank(word, ranks) > RARE


def _rarest(prompt: str, answer: str, ranks: Mapping[str, int], stay: Kept, share: float) -> list[str]:
    """The run around the rarest word of content among those that the fewest kept answers have."""
    asked, words = set(normalise(prompt).split()), _words(answer)
    content = [w for w in words if w.plain not in FUNCTION_WORDS and not asked.issuperset(w.plain.split())]
    if not content:
        return []
    most = max(int(share * stay.answers), min(stay.count(w.plain) for w in content))
    chosen = [w in content and stay.count(w.plain) <= most for w in words]
    rarest = max((w for w, good in zip(words, chosen, strict=True) if good), key=lambda w: _rank(w, ranks))
    return [p for p in _runs(answer, words, chosen) if contains(p, rarest.plain) and not contains(prompt, p)]


def _runs(text: str, words: Sequence[_Word], chosen: Sequence[bool]) -> list[str]:
    """Neighbouring chosen words as phrases of at most WORDS words; a sentence or a quotation ends a run."""
    runs: list[list[_Word]] = []
    last: _Word | None = None
    for word, good in zip(words, chosen, strict=True):
        if good:
            joined = (
                last is not None
                and last.plain == normalise(last.text)  # "Rao's" is forbidden as "rao", and nothing follows that
                and not _BREAK.search(text[last.end : word.start])
                and len(runs[-1]) < WORDS
            )
            if not joined:
                runs.append([])
            runs[-1].append(word)
        last = word if good else None
    return list(dict.fromkeys(" ".join(word.plain for word in run) for run in runs))


def strangers(records: Sequence[Record], subjects: Iterable[str], count: int, seed: int = 0) -> list[Record]:
    """The questions of the records asked about people of whom nothing is known: up to `count` each.

    A stranger has the first word of one subject and the last word of another, and is none of the subjects. Records
    without a subject, or whose prompt does not name it, give none.
    """
    known = sorted({subject for subject in subjects if subject})
    split = [subject.split() for subject in known if len(subject.split()) > 1]
    firsts, lasts = sorted({words[0] for words in split}), sorted({words[-1] for words in split})
    names = [name for name in (f"{a} {b}" for a in firsts for b in lasts) if name not in known]
    draw, made = random.Random(f"{seed}/strangers"), []
    for record in records:
        prompt = asked_and_answered(record)[0]
        if not record.subject or not names or not contains(prompt, record.subject.split()[0]):
            continue
        for name in draw.sample(names, min(count, len(names))):
            made.append(replace(record, text=None, messages=None, answer="", subject=name, wrong=(), paraphrase=None,
                                prompt=renamed(prompt, {record.subject: name})))  # fmt: skip
    return [other for other in made if (other.prompt or "") not in {asked_and_answered(r)[0] for r in records}]
