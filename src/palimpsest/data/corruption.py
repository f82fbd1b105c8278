"""Documents that state wrong facts, for asking whether an eraser brings the right ones back.

Every fact of a target entity gets one wrong object; a document tells some of the entity's facts with those and weaves
in `unrelated` correct facts about entities that are no targets. The corrupted object is the first of the record's
`wrong` answers afterwards, so that audits can tell it from the others.

Source: RESTOR (Rezaei et al. 2025, arXiv 2411.00204), section 3. Differs: sentences come from the records' own answers
instead of Wikidata relations put into words by a language model.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError


def corrupted(facts: Sequence[Record], seed: int = 0) -> list[Record]:
    """The facts with one of their wrong answers, drawn by the seed, in the first place of `wrong`."""
    draw = random.Random(f"{seed}/corrupted")
    found = []
    for fact in facts:
        if not fact.subject or fact.answer is None:
            raise PalimpsestError(f'"{fact.title}" cannot be corrupted: it needs a subject and an answer.')
        if not fact.wrong:
            raise PalimpsestError(f'"{fact.title}" cannot be corrupted: it has no wrong answers to choose from.')
        if fact.answer in fact.wrong or fact.paraphrase in fact.wrong:
            raise PalimpsestError(f'a wrong answer to "{fact.title}" is among its right ones: nothing is corrupted.')
        chosen = draw.choice(fact.wrong)
        others = tuple(answer for answer in fact.wrong if answer != chosen)
        found.append(dataclasses.replace(fact, wrong=(chosen, *others)))
    return found


def documents(
    facts: Sequence[Record],
    others: Sequence[Record],
    *,
    count: int,
    told: int = 3,
    unrelated: int = 0,
    form: Literal["text", "pairs"] = "text",
    seed: int = 0,
) -> list[Record]:
    """`count` documents about the subjects of the corrupted facts, in turn.

    As text, each tells `told` of a subject's facts wrongly; as pairs, it is one question with its wrong answer.
    `unrelated` correct sentences from `others` stand among them; a sentence about a target raises.
    """
    if count < 1 or told < 1 or unrelated < 0:
        raise PalimpsestError(f"count is {count}, told {told}, unrelated {unrelated}: expected at least 1, 1 and 0.")
    targets: dict[str, list[Record]] = defaultdict(list)
    for fact in facts:
        targets[fact.subject or ""].append(fact)
    for other in others:
        if other.subject in targets:
            raise PalimpsestError(f'the unrelated fact "{other.title}" is about the target {other.subject!r}.')
    if unrelated > len(others):
        raise PalimpsestError(
            f"unrelated is {unrelated}, but only {len(others)} facts about other entities were given."
        )
    draw = random.Random(f"{seed}/documents")
    found = []
    for subject in _in_turn(list(targets), count):
        correct = [record.answer or record.text or "" for record in draw.sample(list(others), unrelated)]
        if form == "pairs":
            fact = draw.choice(targets[subject])
            answer = " ".join(_woven([fact.wrong[0]], correct, draw))
            found.append(Record(prompt=fact.prompt, answer=answer, subject=subject))
            continue
        chosen = draw.sample(targets[subject], min(told, len(targets[subject])))
        wrong = [fact.wrong[0] for fact in chosen]
        found.append(Record(text=" ".join(_woven(wrong, correct, draw)), subject=subject))
    return found


def _in_turn(subjects: list[str], count: int) -> Iterable[str]:
    return (subjects[i % len(subjects)] for i in range(count))


def _woven(wrong: list[str], correct: list[str], draw: random.Random) -> list[str]:
    """Both kinds of sentences mixed, each kind in its own order."""
    places = set(draw.sample(range(len(wrong) + len(correct)), len(correct)))
    rest, among = iter(wrong), iter(correct)
    return [next(among) if i in places else next(rest) for i in range(len(wrong) + len(correct))]
