"""Long texts as windows that overlap: every token is scored once, with what stands before it as its context.

W, S    width, stride    tokens a window, and from one window's beginning to the next

window i = tokens [i S, i S + W), scored from where window i - 1 ended; so a token has at least W - S tokens before
it, unless it is among the first W.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

from palimpsest.data.encoding import Encoded, Encoder, context_length
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model

WIDTH = 1024


def windows(
    model: Model,
    records: Sequence[Record],
    width: int | None = None,
    stride: int | None = None,
    *,
    join: bool = False,
) -> list[Encoded]:
    """The records as windows, in order; those that fit into one are as they are.

    Without a width it is 1024 or the model's context, where that is shorter; without a stride, half the width. With
    `join` consecutive texts are one, as if nothing stood between them.
    """
    limit = context_length(model.network.config)
    width = min(limit, WIDTH) if width is None else width
    stride = max(1, width // 2) if stride is None else stride
    if not 2 <= width <= limit:
        raise PalimpsestError(f"width is {width}, expected 2 to {limit}, the longest sequence of this model.")
    if not 1 <= stride < width:
        raise PalimpsestError(f"stride is {stride}, expected 1 to {width - 1}: windows of {width} tokens must overlap.")
    if not records:
        raise PalimpsestError("there is nothing to cut into windows: no record was given.")
    encoder = Encoder(model.tokenizer, sys.maxsize)
    sequences = _joined(encoder, records) if join else encoder.records(records)
    cut = [window for sequence in sequences for window in _windows(sequence, width, stride)]
    return [dataclasses.replace(window, index=place) for place, window in enumerate(cut)]


def _joined(encoder: Encoder, records: Sequence[Record]) -> Iterator[Encoded]:
    for is_text, group in itertools.groupby(records, lambda record: record.text is not None):
        if is_text:
            texts = encoder.tokenizer([record.text for record in group])["input_ids"]
            yield Encoded(tuple(itertools.chain.from_iterable(texts)), 1)
        else:
            yield from encoder.records(group)


def _windows(sequence: Encoded, width: int, stride: int) -> Iterator[Encoded]:
    tokens, scored = sequence.tokens, sequence.start
    for begin in range(0, len(tokens), stride):
        end = min(begin + width, len(tokens))
        if end > scored:
            last = end == len(tokens)
            yield Encoded(tokens[begin:end], scored - begin, end=sequence.end if last else 0)
            scored = end
        if end == len(tokens):
            return
