from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SENTENCES, build_model
from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record
from palimpsest.data.windows import _windows, windows
from palimpsest.errors import PalimpsestError

LONG = Record(text=" ".join(SENTENCES[:6]))


@given(st.integers(2, 200), st.integers(2, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_every_token_is_scored_once_with_enough_before_it(length, width, data):
    stride = data.draw(st.integers(1, width - 1))
    start = data.draw(st.integers(1, length - 1))
    found = list(_windows(Encoded(tuple(range(length)), start, end=1), width, stride))
    assert [t for window in found for t in window.targets] == list(range(start, length))
    for window in found:
        assert len(window.tokens) <= width
        assert list(window.tokens) == list(range(window.tokens[0], window.tokens[0] + len(window.tokens)))
        first = window.targets[0]
        assert first - window.tokens[0] >= min(width - stride, first)
    assert [window.end for window in found] == [0] * (len(found) - 1) + [1]


def test_windows_of_a_long_text_are_those_of_the_code():
    (whole,) = Encoder(build_model("llama").tokenizer, 10**6).records([LONG])
    found = windows(build_model("llama"), [LONG], 8, 4)
    assert found[0].tokens == whole.tokens[:8]
    assert found[0].start == 1
    assert found[1].tokens == whole.tokens[4:12]
    assert found[1].start == 4
    assert sum(len(window.targets) for window in found) == len(whole.targets)
    assert [window.index for window in found] == list(range(len(found)))


def test_records_that_fit_stay_as_they_are():
    records = [Record(prompt="Where was Ada Moreau born ?", answer="Ada Moreau was born in Lyon ."), LONG]
    model = build_model("llama")
    assert windows(model, records) == Encoder.of(model).records(records)


def test_texts_can_be_one_stream():
    model, texts = build_model("llama"), [Record(text=text) for text in SENTENCES[:4]]
    (whole,) = windows(model, texts, 1000, join=True)
    assert whole.tokens == tuple(model.tokenizer(" ".join(SENTENCES[:4]))["input_ids"])
    assert len(windows(model, texts, 1000)) == 4
    asked = Record(prompt="Where was Ada Moreau born ?", answer="Lyon .")
    assert len(windows(model, [*texts, asked, *texts], 1000, join=True)) == 3


@torch.no_grad()
def test_a_token_in_a_window_is_predicted_from_the_window_alone(llama):
    second = windows(llama, [LONG], 8, 4)[1]
    logits = llama(input_ids=torch.tensor([second.tokens])).logits
    assert logits.shape[1] == 8
    assert second.targets == second.tokens[4:]


def test_bad_widths_and_strides_are_named(gpt2):
    with pytest.raises(PalimpsestError, match="width is 200, expected 2 to 128, the longest sequence of this model"):
        windows(gpt2, [LONG], 200)
    with pytest.raises(PalimpsestError, match="width is 1, expected"):
        windows(gpt2, [LONG], 1)
    with pytest.raises(PalimpsestError, match="stride is 8, expected 1 to 7"):
        windows(gpt2, [LONG], 8, 8)
    with pytest.raises(PalimpsestError, match="no record was given"):
        windows(gpt2, [])
