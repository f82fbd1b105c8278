"""Prompts as a guarded model meets them: tokens with the words of a template around a question, and when to look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from palimpsest.data.encoding import Encoder
from palimpsest.errors import PalimpsestError
from palimpsest.models.phrases import Pieces


class Wording:
    """A tokenizer with what it puts around questions. Copies of a model share it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, 1 << 30)
        self._pieces: dict[int, Pieces] = {}
        first, second = self._probes()
        self._tail = _common(first[::-1], second[::-1])[::-1]
        self._head = self.text(_common(first, second))
        marks = [self._head.rfind(mark) for mark in tokenizer.all_special_tokens if mark in self._head]
        self._opening = self._head[max(marks, default=0) :]
        self._ending = self.text(self._tail)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wording:
        return self

    def _probes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompts of two words that the tokenizer tells apart, from which what it puts around them shows."""
        words = (self.tokenizer.decode([token]).strip() for token in range(len(self.tokenizer)))
        prompts = (self._encoder.prompt(word) for word in words if len(word) > 1 and word.isalpha())
        first = next(prompts, None)
        second = next((other for other in prompts if other != first), None)
        if first is None or second is None:
            raise PalimpsestError("the tokenizer has no two words that it tells apart: prompts cannot be read.")
        return first, second

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def prompt(self, question: str) -> tuple[int, ...]:
        """Tokens up to where the answer begins."""
        return self._encoder.prompt(question)

    def beginning(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that is to be gone on with."""
        ids = tuple(self.tokenizer(text)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.end else ids

    def tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of an answer."""
        return self._encoder.pair("", text).targets[:-1]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with those of the template."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def question(self, text: str) -> str:
        """What the last question of a prompt asks, without the words of the template; of a plain text, all of it."""
        asked = text.removesuffix(self._ending)
        unknown = self.tokenizer.unk_token
        if unknown and unknown in self._opening:  # it may stand for a word of the question, too
            asked = asked.removeprefix(self._head)
        elif self._opening:
            asked = asked.rpartition(self._opening)[2]
        for mark in self.tokenizer.all_special_tokens:
            asked = asked.replace(mark, " ")
        return asked.strip()

    def ends(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """How many tokens of each sequence are its prompt: up to the last words that end one, else the first token."""
        return [_after_last(tuple(row), self._tail) or 1 for row in rows]

    def pieces(self, size: int) -> Pieces:
        """What each of that many tokens adds to a text."""
        if size not in self._pieces:
            self._pieces[size] = Pieces(self.tokenizer, size)
        return self._pieces[size]


class Watcher:
    """A first look at a generation: where `look` says so, it is given up after one token."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self.stopped = False
        self.processor = _First(self, look)
        self.criterion = _GivenUp(self)


class _First(LogitsProcessor):
    def __init__(self, watcher: Watcher, look: Callable[[], bool]) -> None:
        self._watcher, self._look, self._seen = watcher, look, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._seen:
            self._seen = True
            self._watcher.stopped = self._look()
        return scores


class _GivenUp(StoppingCriteria):
    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._watcher.stopped, dtype=torch.bool, device=input_ids.device)


def _common(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return tuple(first[:same])


def _after_last(row: tuple[int, ...], part: tuple[int, ...]) -> int:
    """Where the last occurrence ends; 0 where there is none."""
    size = len(part)
    places = range(len(row), size - 1, -1) if size else ()
    return next((end for end in places if row[end - size : end] == part), 0)
