"""Finding phrases in text as it is generated, whichever tokens spell it: an automaton over letters, and what each token
of a vocabulary adds to the text.

The automaton is Aho and Corasick's (1975) over normalised text, with a space in front of every phrase so that matches
begin at a word. Its transitions are one table, so that all tokens of a vocabulary are tried from a state at once, a
letter at a time.

    next      [nodes, letters]  where a letter leads; letter 0 is any that no phrase has, 1 the space
    complete  [nodes]           a phrase ends here
    fraction  [nodes]           largest matched share of a phrase that is not complete, 0 to 1

A phrase is hit where it is complete and a word ends: before a space, or where a token ends, as a decoder may stop
there. "York" + "shire" is therefore hit at its first token, the single token "Yorkshire" is not.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from palimpsest.data.forbidden import normalise, spelled
from palimpsest.errors import PalimpsestError

BROKEN = "\ufffd"
"""What a tokenizer writes for a character of which bytes are missing."""


class Automaton:
    """All phrases at once; `begin` is the state where a word may begin."""

    begin = 1

    def __init__(self, phrases: Sequence[str]) -> None:
        self.phrases = tuple(dict.fromkeys(normalise(phrase) for phrase in phrases))
        for given, phrase in zip(phrases, map(normalise, phrases), strict=True):
            if not phrase:
                raise PalimpsestError(f"the phrase {given!r} has no letter or digit: nothing of it can be matched.")
        letters = sorted(set("".join(self.phrases)) - {" "})
        self.letters = {" ": 1, **{letter: code for code, letter in enumerate(letters, start=2)}}
        children: list[dict[int, int]] = [{1: 1}, {}]
        own_fraction, ends = [0.0, 0.0], [-1, -1]
        spaces = [False, True]
        for number, phrase in enumerate(self.phrases):
            node = self.begin
            for depth, letter in enumerate(phrase, start=1):
                code = self.letters[letter]
                if code not in children[node]:
                    children[node][code] = len(children)
                    children.append({})
                    own_fraction.append(0.0)
                    ends.append(-1)
                    spaces.append(letter == " ")
                node = children[node][code]
                if depth < len(phrase):
                    own_fraction[node] = max(own_fraction[node], depth / len(phrase))
            ends[node] = number
        self._link(children, own_fraction, ends, spaces)

    def _link(self, children: list[dict[int, int]], fraction: list[float], ends: list[int], spaces: list[bool]) -> None:
        """Where each state falls back to (its longest suffix that is a state), breadth first."""
        self.next: Int[np.ndarray, "nodes letters"] = np.zeros((len(children), len(self.letters) + 1), dtype=np.int32)
        self.fraction: Float[np.ndarray, " nodes"] = np.array(fraction)
        self.complete: Bool[np.ndarray, " nodes"] = np.array(ends) >= 0
        self._ends = ends
        self._fallback = [0] * len(children)
        waiting = deque([0])
        while waiting:
            node = waiting.popleft()
            back = self._fallback[node]
            if node:
                self.next[node] = self.next[back]
                self.fraction[node] = max(self.fraction[node], self.fraction[back])
                self.complete[node] |= self.complete[back]
            for code, child in children[node].items():
                self._fallback[child] = int(self.next[node, code]) if node else 0
                self.next[node, code] = child
                waiting.append(child)
            if spaces[node]:
                self.next[node, 1] = node  # several separators are one

    def read(self, state: int, letters: str) -> int:
        """The state after some spelled text."""
        for letter in letters:
            state = int(self.next[state, self.letters.get(letter, 0)])
        return state

    def found(self, text: str) -> tuple[str, ...]:
        """The phrases whose words stand in the text, one after the other."""
        places, state = set(), self.begin
        for letter in normalise(text) + " ":
            if letter == " " and self.complete[state]:
                node = state
                while node:
                    places.add(self._ends[node])
                    node = self._fallback[node]
            state = int(self.next[state, self.letters.get(letter, 0)])
        return tuple(phrase for number, phrase in enumerate(self.phrases) if number in places)


class Pieces:
    """What every token of a vocabulary adds to a text, as it is and spelled.

    `opens` begins with something that ends a word, `inner` has a word that begins and ends inside, or ends in, `blank`
    adds nothing (special tokens), `broken` has bytes of characters that other tokens complete.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = tokenizer
        self._anchor = self._find_anchor()
        special = set(tokenizer.all_special_ids)
        known = min(size, len(tokenizer))
        texts = self._added([[token] for token in range(known)]) + [""] * (size - known)
        self.texts = ["" if token in special else text for token, text in enumerate(texts)]
        self.broken = frozenset(token for token, text in enumerate(self.texts) if BROKEN in text)
        self.spelled = [spelled(text.rstrip(BROKEN)) for text in self.texts]
        self.blank: Bool[np.ndarray, " vocabulary"] = np.array([not text for text in self.texts])
        self.opens: Bool[np.ndarray, " vocabulary"] = np.array([text.startswith(" ") for text in self.spelled])
        self.inner: Bool[np.ndarray, " vocabulary"] = np.array([bool(re.search("[^ ] ", s)) for s in self.spelled])
        self.alphabet = sorted(set("".join(self.spelled)))
        self._lay_out()

    def _find_anchor(self) -> list[int]:
        """A token after which others are decoded as in the middle of a text."""
        for token in range(len(self._tokenizer)):
            text = self._tokenizer.decode([token], skip_special_tokens=True)
            if text and text.strip() == text and text.isalnum():
                return [token]
        raise PalimpsestError("no token of the tokenizer is a letter or a word: its texts cannot be compared.")

    def _added(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self._tokenizer.decode(self._anchor, **how)
        texts = self._tokenizer.batch_decode([[*self._anchor, *group] for group in tokens], **how)
        alone = self._tokenizer.batch_decode([list(group) for group in tokens], **how)
        return [
            text[len(before) :] if text.startswith(before) else other for text, other in zip(texts, alone, strict=True)
        ]

    def _lay_out(self) -> None:
        """The spelled tokens as columns of letters, the longest tokens first, so that columns grow shorter."""
        code = {letter: number for number, letter in enumerate(self.alphabet)}
        lengths = np.array([len(text) for text in self.spelled])
        self._order = np.argsort(-lengths, kind="stable")
        counts = [(lengths > place).sum() for place in range(int(lengths.max(initial=0)))]
        self._columns = [
            np.array([code[self.spelled[token][place]] for token in self._order[:count]], dtype=np.int32)
            for place, count in enumerate(counts)
        ]

    def read(self, token: int, pending: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The text that a token adds after tokens with unfinished characters, and those unfinished after it."""
        if not pending and token not in self.broken:
            return self.texts[token], ()
        before, whole = self._added([[*pending], [*pending, token]]) if pending else ("", self.texts[token])
        text = whole[len(before.rstrip(BROKEN)) :]
        unfinished = token in self.broken and text.endswith(BROKEN)
        return (text.rstrip(BROKEN), (*pending, token)) if unfinished else (text, ())

    def outcomes(
        self, automaton: Automaton, state: int, pending: tuple[int, ...] = ()
    ) -> tuple[Int[np.ndarray, " vocabulary"], Bool[np.ndarray, " vocabulary"]]:
        """For every token the state that it leads to, and whether it completes a phrase."""
        # after an unfinished character any whole token begins as after a separator; the others are read one by one
        begin = state if not pending else int(automaton.next[state, 1])
        local = np.array([automaton.letters.get(letter, 0) for letter in self.alphabet], dtype=np.int32)
        reached = np.full(len(self.spelled), begin, dtype=np.int32)
        hit = np.zeros(len(self.spelled), dtype=bool)
        for place, column in enumerate(self._columns):
            codes = local[column]
            if place:
                hit[: len(codes)] |= automaton.complete[reached[: len(codes)]] & (codes == 1)
            reached[: len(codes)] = automaton.next[reached[: len(codes)], codes]
        moved = len(self._columns[0]) if self._columns else 0
        hit[:moved] |= automaton.complete[reached[:moved]]
        states, hits = np.empty_like(reached), np.empty_like(hit)
        states[self._order], hits[self._order] = reached, hit
        if pending:
            for token in self.broken:
                text, _ = self.read(token, pending)
                states[token], hits[token] = advance(automaton, state, spelled(text))
        return states, hits


def advance(automaton: Automaton, state: int, letters: str) -> tuple[int, bool]:
    """The state after a spelled token, and whether it completes a phrase: `Pieces.outcomes` for one token."""
    hit = False
    for place, letter in enumerate(letters):
        hit |= place > 0 and letter == " " and bool(automaton.complete[state])
        state = automaton.read(state, letter)
    return state, hit or (bool(letters) and bool(automaton.complete[state]))
