from __future__ import annotations

import pytest

from memorised import reciting
from palimpsest.errors import PalimpsestError
from palimpsest.recall.chunks import sentences
from palimpsest.recall.summary import ExtractiveSummariser, ModelSummariser, without
from remembering import HashedWords, turns


def summariser(limit=20):
    words = HashedWords()
    return ExtractiveSummariser(words, words.lengths, limit)


def test_what_fits_is_kept_as_it_is():
    assert summariser()("I am Ada.", "I live in Lyon. I paint.") == "I am Ada.\nI live in Lyon.\nI paint."


def test_the_summary_keeps_to_the_cap_and_to_what_was_said():
    summarise, summary, said = summariser(), "", ""
    for user, reply in turns(60):
        summary = summarise(summary, f"{user}\n{reply}")
        said += f"{user}\n{reply}\n"
        assert 0 < len(summary.split()) <= 20
        assert all(sentence.strip() in said for sentence in sentences(summary))


def test_it_takes_the_central_and_leaves_repetitions():
    same = ["The harbour is busy today.", "The harbour was busy today.", "The harbour is very busy today."]
    found = summariser(13)("", " ".join([*same, "My sister and I walk along the harbour."]))
    assert sum(sentence in found for sentence in same) == 1
    assert "walk along" in found


def test_a_sentence_longer_than_the_cap_is_cut_at_its_end():
    long = "word " * 30 + "end."
    assert summariser(7)("", long) == "word word word word word word word"


def test_equal_input_equal_output():
    said = " ".join(user for user, _ in turns(12))
    assert summariser()("", said) == summariser()("", said)


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(PalimpsestError, match="both texts are empty"):
        summariser()(" ", "\n")


def test_a_sentence_of_a_forgotten_text_leaves_the_summary():
    summary = "I am Ada.\nMy pin is 4711.\nI paint"
    assert without(summary, ["So: my door.  My pin is\n4711. Bye."]) == "I am Ada.\nI paint"
    assert without(summary, ["I paint on Sundays."]) == "I am Ada.\nMy pin is 4711."  # a beginning is a part, too
    assert without(summary, ["nothing of it"]) == summary


def test_a_language_model_writes_a_summary_within_its_cap():
    model = reciting()
    summarise = ModelSummariser(model, limit=5)
    written = summarise("Ada Moreau was born in Lyon .", "What does Ada Moreau do for a living ?")
    assert not summarise.extractive
    assert written
    assert len(model.tokenizer(written)["input_ids"]) <= 5
