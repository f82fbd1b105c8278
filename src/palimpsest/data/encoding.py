"""Records as token sequences with a mask of what is scored.

A prompt with an answer is written in the tokenizer's own chat template; only the answer and the token that ends it are
scored. A text is scored whole, except its first token, which nothing predicts. Prompt and answer are tokenised apart,
so the same prompt always gives the same tokens, whatever the answer: that is what lets `packing` compute it once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

PLAIN_PROMPT = "Question: {prompt}\nAnswer:"


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one sequence, and from which position on they are scored. `cut` counts tokens that did not fit.

    `end` is 1 where the last token is an end mark that measures of wording leave out.
    """

    tokens: tuple[int, ...]
    start: int
    index: int = 0
    cut: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        if self.start < 1:
            raise PalimpsestError(f"sequence {self.index + 1} scores its first token, which nothing predicts.")
        if self.start >= len(self.tokens):
            raise PalimpsestError(f"sequence {self.index + 1} has no token to score.")

    @property
    def targets(self) -> tuple[int, ...]:
        """The scored tokens."""
        return self.tokens[self.start :]

    @property
    def size(self) -> int:
        """Tokens that it adds to a batch."""
        return len(self.tokens)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes two sequences the same to train on; quick to find."""
        return (self.tokens, self.start)

    @property
    def content(self) -> tuple[Any, ...]:
        """The same as values that another process would find, too."""
        return self.identity


class Encoder:
    """Turns records into `Encoded` sequences with one tokenizer and a longest length in tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise PalimpsestError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token.")
        self._prompts: dict[str, tuple[int, ...]] = {}

    @classmethod
    def of(cls, model: Any, max_length: int | None = None) -> Encoder:
        """The encoder of a model: its tokenizer and its longest context (or `max_length` where that is shorter)."""
        limit = context_length(model.network.config)
        return cls(model.tokenizer, min(limit, max_length or limit))

    def prompt(self, prompt: str) -> tuple[int, ...]:
        """Tokens up to where the answer begins."""
        if prompt not in self._prompts:
            if getattr(self.tokenizer, "chat_template", None):
                ids = tuple(self._chat([{"role": "user", "content": prompt}], add_generation_prompt=True))
            else:
                ids = self.unfinished(PLAIN_PROMPT.format(prompt=prompt))
            self._prompts[prompt] = ids
        return self._prompts[prompt]

    def conversation(self, messages: Sequence[Any]) -> tuple[int, ...]:
        """Tokens of a chat up to where the next answer begins; without a chat template, roles are written out."""
        if getattr(self.tokenizer, "chat_template", None):
            return tuple(self._chat(list(messages), add_generation_prompt=True))
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
        return self.unfinished("".join(lines) + "Assistant:")

    def unfinished(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that goes on: without the end mark that some tokenizers put behind every text."""
        ids = self.tokenizer(text)["input_ids"]
        return tuple(ids[:-1] if len(ids) > 1 and ids[-1] == self.eos else ids)

    def pair(self, prompt: str, answer: str, index: int = 0) -> Encoded:
        """A prompt and its answer, the answer and its end scored."""
        head = self.prompt(prompt)
        spaced = answer if getattr(self.tokenizer, "chat_template", None) else " " + answer
        tail = (*self.tokenizer(spaced, add_special_tokens=False)["input_ids"], self.eos)
        return self._fit(head + tail, len(head), index, end=1)

    def text(self, text: str, index: int = 0) -> Encoded:
        """A text, scored from its second token."""
        tokens = tuple(self.tokenizer(text)["input_ids"])
        return self._fit(tokens, 1, index)

    def chat(self, messages: Sequence[Any], index: int = 0) -> Encoded:
        """A chat, its last message scored."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise PalimpsestError("a record holds chat messages, but the tokenizer has no chat template.")
        if (role := messages[-1]["role"]) in ("user", "system"):
            raise PalimpsestError(
                f"record {index + 1} is a chat that ends with the {role}'s words: what the model says must come last."
            )
        head = tuple(self._chat(list(messages[:-1]), add_generation_prompt=True))
        tail = self.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        return self._fit((*head, *tail, self.eos), len(head), index, end=1)

    def record(self, record: Record, index: int = 0) -> Encoded:
        """The sequence that a model learns from this record."""
        if record.prompt is not None and record.answer is not None:
            return self.pair(record.prompt, record.answer, index)
        if record.messages is not None:
            return self.chat(record.messages, index)
        if record.text is not None:
            return self.text(record.text, index)
        raise PalimpsestError(f"record {index + 1} is an image; this needs text.")

    def records(self, records: Iterable[Record], warn: Callable[[str], None] | None = None) -> list[Encoded]:
        """The sequences of the records in order; says how many had to be cut, and raises where nothing is scored."""
        encoded = [self.record(record, index) for index, record in enumerate(records)]
        cut = [sequence for sequence in encoded if sequence.cut]
        if cut and warn is not None:
            lost = sum(sequence.cut for sequence in cut)
            many = f"{len(cut)} of {len(encoded)} records are"
            warn(f"{many} longer than {self.max_length} tokens; {lost} tokens were cut.")
        return encoded

    def _fit(self, tokens: tuple[int, ...], start: int, index: int, end: int = 0) -> Encoded:
        cut = max(0, len(tokens) - self.max_length)
        kept = tokens[: self.max_length]
        if start < 1 or start >= len(kept):
            raise PalimpsestError(
                f"record {index + 1} has no token to score: its prompt takes {start} tokens "
                f"and the longest sequence is {self.max_length}. Shorten the prompt or raise max_length."
            )
        return Encoded(kept, start, index, cut, 0 if cut else end)

    def _chat(self, messages: list[Any], **keywords: Any) -> list[int]:
        ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **keywords)["input_ids"]
        return list(ids)


def context_length(config: Any) -> int:
    """The longest sequence, in tokens, that the model was made for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in ("max_position_embeddings", "n_positions"):
        if getattr(text, field, None):
            return int(getattr(text, field))
    return 1 << 30
