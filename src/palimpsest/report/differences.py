"""Two answers word by word: what one has that the other has not."""

from __future__ import annotations

import difflib
import re

Marked = list[tuple[str, bool]]


def differences(before: str, after: str) -> tuple[Marked, Marked]:
    """Both texts as runs of (text, whether the other text lacks it); the runs joined give back each text."""
    left, right = (re.findall(r"\s*\S+|\s+", text) for text in (before, after))
    # Case and punctuation at the edge of a word are not news.
    bare = [[re.sub(r"\W+", "", word).lower() or word.strip() for word in words] for words in (left, right)]
    matcher = difflib.SequenceMatcher(a=bare[0], b=bare[1], autojunk=False)
    marked: tuple[Marked, Marked] = ([], [])
    for tag, start, stop, other_start, other_stop in matcher.get_opcodes():
        for runs, words in ((marked[0], left[start:stop]), (marked[1], right[other_start:other_stop])):
            text = "".join(words)
            # A mark that starts with a space looks like a stain, so the space stays outside.
            space = text[: len(text) - len(text.lstrip())] if tag != "equal" else ""
            runs.extend(run for run in ((space, False), (text[len(space) :], tag != "equal")) if run[0])
    return marked
