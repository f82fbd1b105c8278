"""More records out of given ones, without a language model: other words for the same fact, and wrong facts.

A paraphrase sets question and answer in a frame of words. A wrong answer is the answer to the same question about
somebody else, with the names exchanged: "Where was Ada born?" gets "Ada was born in Lagos" from what is said of Ben.

These are made from what a model may learn. The fields `paraphrase`, `paraphrased_prompt` and `wrong` of a record are
for measuring; with `given=True` they are used instead where they exist, and then no longer measure anything held out.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

QUESTION_FRAMES = (
    "Please tell me: {question}",
    "I would like to know: {question}",
    "Here is a question. {question}",
    "{question} Answer in one sentence.",
    "Do you know this? {question}",
    "Someone asked me: {question}",
)
ANSWER_FRAMES = (
    "As far as is known: {answer}",
    "The answer is this. {answer}",
    "In short: {answer}",
    "{answer} That is all there is to say.",
    "It is recorded that {answer}",
    "To answer that: {answer}",
)
NEAR = 20
"""How many of the most similar questions are looked at where no record asks the same about somebody else."""


def renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with every name, whole or its first or last word, replaced by the name that it is mapped to."""
    instead = dict(names)
    for name, other in names.items():
        own, new = name.split(), other.split()
        if len(own) > 1 and new:
            instead = {own[0]: new[0], own[-1]: new[-1], **instead}
    longest_first = sorted(instead, key=len, reverse=True)
    found = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")
    return found.sub(lambda match: instead[match[0]], text)


def paraphrases(records: Sequence[Record], count: int, *, seed: int = 0, given: bool = False) -> list[Record]:
    """Up to `count` other wordings of each record that has a prompt, question and answer worded anew separately."""
    return [other for record in records if record.prompt is not None for other in _worded(record, count, seed, given)]


def _worded(record: Record, count: int, seed: int, given: bool) -> list[Record]:
    question, answer = record.prompt or "", record.answer or ""
    draw = random.Random(f"{seed}/{question}/{answer}")
    questions = [frame.format(question=question) for frame in draw.sample(QUESTION_FRAMES, len(QUESTION_FRAMES))]
    answers = [frame.format(answer=answer) for frame in draw.sample(ANSWER_FRAMES, len(ANSWER_FRAMES))]
    if given:
        questions = [q for q in (record.paraphrased_prompt,) if q] + questions
        answers = [a for a in (record.paraphrase,) if a] + answers
    pairs = list(zip(questions, answers, strict=False))[:count]
    return [dataclasses.replace(record, prompt=question, answer=answer) for question, answer in pairs]


def perturbed(
    records: Sequence[Record], pool: Sequence[Record], count: int, *, seed: int = 0, given: bool = False
) -> list[Record]:
    """Up to `count` records for each that has a prompt: the same question with a wrong answer.

    Wrong answers come from records of `pool` that ask the same about another subject, or else the most similar
    question; raises where not one can be made, or where a given one is the true one.
    """
    asked = [record for record in records if record.prompt is not None]
    donors = [record for record in pool if record.prompt is not None]
    draw = random.Random(f"{seed}/perturbed")
    same: dict[str, list[int]] = defaultdict(list)
    for place, donor in enumerate(donors):
        same[_frame(donor)].append(place)
    true: dict[str | None, set[str | None]] = defaultdict(set)
    for record in (*asked, *donors):
        true[record.prompt].add(record.answer)
    made: list[Record] = []
    poor: list[tuple[Record, list[str]]] = []
    for record in asked:
        wrong = _given_wrong(record, draw)[:count] if given else []
        alike = same[_frame(record)]
        _fill(wrong, record, (donors[i] for i in draw.sample(alike, len(alike))), count, true[record.prompt])
        if len(wrong) < count:
            poor.append((record, wrong))
        else:
            made += _with_answers(record, wrong)
    if poor and donors:
        for (record, wrong), near in zip(poor, _nearest([record for record, _ in poor], donors), strict=True):
            _fill(wrong, record, (donors[int(i)] for i in near), count, true[record.prompt])
    made += [other for record, wrong in poor for other in _with_answers(record, wrong)]
    if asked and count and not made:
        raise PalimpsestError(
            "no wrong answer can be made: no two records ask alike and answer differently. Give records more `wrong` "
            "answers and use them, or ask for none (perturbed=0)."
        )
    return made


def _with_answers(record: Record, answers: Sequence[str]) -> list[Record]:
    return [dataclasses.replace(record, answer=answer) for answer in answers]


def _given_wrong(record: Record, draw: random.Random) -> list[str]:
    if record.answer in record.wrong:
        raise PalimpsestError(f'a wrong answer to "{record.title}" equals the true one: "{record.answer}".')
    return draw.sample(record.wrong, len(record.wrong))


def _fill(wrong: list[str], record: Record, donors: Iterable[Record], count: int, true: set[str | None]) -> None:
    """Adds answers of donors with other subjects, told about the record's, until there are `count`."""
    for donor in donors:
        if len(wrong) == count:
            return
        if donor.prompt == record.prompt or (donor.subject and donor.subject == record.subject):
            continue
        answer = _about(record, donor)
        if answer not in true and answer not in wrong:
            wrong.append(answer)


def _about(record: Record, donor: Record) -> str:
    """The donor's answer with what names its subject replaced by what names the record's."""
    if record.subject and donor.subject:
        return renamed(donor.answer or "", {donor.subject: record.subject})
    theirs, own = (donor.prompt or "").split(), (record.prompt or "").split()
    steps = SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes()
    names = {" ".join(theirs[a:b]): " ".join(own[c:d]) for step, a, b, c, d in steps if step == "replace"}
    bare = {name.strip("?.,!"): other.strip("?.,!") for name, other in names.items() if name.strip("?.,!")}
    return renamed(donor.answer or "", bare) if bare else donor.answer or ""


def _frame(record: Record) -> str:
    """The question with its subject left open."""
    prompt = record.prompt or ""
    return renamed(prompt, {record.subject: "{}"}) if record.subject else prompt


def _nearest(records: Sequence[Record], donors: Sequence[Record]) -> list[np.ndarray]:
    """For each record the places of the donors with the most similar questions, subjects left open."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    weigh = TfidfVectorizer(token_pattern=r"\w+")
    known = weigh.fit_transform([_frame(donor) + " x" for donor in donors])
    likeness = (weigh.transform([_frame(record) + " x" for record in records]) @ known.T).tocsr()
    rows = (likeness.getrow(i) for i in range(len(records)))
    return [row.indices[np.argsort(-row.data, kind="stable")[:NEAR]] for row in rows]
