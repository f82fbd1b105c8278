from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from palimpsest.recall.chunks import chunks, sentences


def words(texts):
    return [len(text.split()) for text in texts]


@given(st.text(alphabet="ab .!?\n\"'é", min_size=1, max_size=200), st.integers(1, 12))
def test_joined_again_the_parts_are_the_text(text, limit):
    assert "".join(sentences(text)) == text
    found = chunks(text, limit, words)
    assert "".join(found) == text
    assert all(found)
    assert all(size <= limit for size in words(found))


def test_sentences_end_at_marks_and_lines():
    text = 'He said "no." Then he left! Why?\nNobody knows 3.14 or e.g. this'
    assert sentences(text) == ['He said "no." ', "Then he left! ", "Why?\n", "Nobody knows 3.14 or e.g. ", "this"]


def test_a_long_text_is_cut_where_sentences_end_and_a_long_sentence_between_words():
    assert chunks("One two three. Four five. Six seven eight nine.", 5, words) == [
        "One two three. Four five. ",
        "Six seven eight nine.",
    ]
    assert chunks("a b c d e f g", 3, words) == ["a b c ", "d e f ", "g"]
    assert chunks("short", 3, words) == ["short"]
