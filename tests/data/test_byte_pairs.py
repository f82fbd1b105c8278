"""Tokenizers made from texts."""

from __future__ import annotations

from conftest import SENTENCES, build_tokenizer
from palimpsest.data.byte_pairs import byte_pairs, marks_of


def test_it_covers_every_text_and_keeps_the_marks():
    marks = marks_of(build_tokenizer())
    tokenizer = byte_pairs(SENTENCES, 400, marks)
    assert len(tokenizer) <= 400
    assert marks_of(tokenizer) == marks == {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"}
    for text in (SENTENCES[0], "Größe 水"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_frequent_words_are_one_token():
    tokenizer = byte_pairs(["remember remember"] * 9, 300, {"eos_token": "<eos>"})
    assert len(tokenizer("remember")["input_ids"]) < 3
