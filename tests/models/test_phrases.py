from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from conftest import build_tokenizer
from palimpsest.data.forbidden import contains, normalise, spelled
from palimpsest.errors import PalimpsestError
from palimpsest.models.phrases import BROKEN, Automaton, Pieces, advance

BYTES = {byte: chr(byte) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 else "" for byte in range(256)}
BYTES |= {byte: chr(256 + place) for place, byte in enumerate(byte for byte in range(256) if not BYTES[byte])}
PIECES = (
    *("a", " Paris", " Par", " PAR", "is", "IS", " P", "P", "a", "ar", "r", "i", "s", " ", "\n", "Paris", " pa", "ris"),
    *("ian", " in", " New", " York", "shire", " Yorkshire", ", ", ".", " x, y. ", "new york", "-", "York", " caf", "e"),
)
RAW = (b"\xc3", b"\xa9", b" \xc3", b"\xa9s", b"x\xc3", b"\xe2\x80", b"\x8b", b"\xe2\x80\x8b")
MARKS = ("<eos>", "<unk>")


def byte_level():
    """A tokenizer that writes bytes as byte-level BPE does, with the given pieces as tokens."""
    words = dict.fromkeys("".join(BYTES[byte] for byte in piece) for piece in (*(p.encode() for p in PIECES), *RAW))
    core = Tokenizer(WordLevel({word: i for i, word in enumerate((*MARKS, *words))}, unk_token="<unk>"))
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


TOKENIZER = byte_level()
ALL = Pieces(TOKENIZER, len(TOKENIZER) + 3)
WORDS = st.text(alphabet="abA ,", max_size=12)


def naive(phrases, texts):
    """For growing texts, whether the last step completes a phrase, by looking at whole texts."""
    return [any(_ends(after, before, phrase) for phrase in phrases) for before, after in pairwise(texts)]


def _ends(after, before, phrase):
    """Whether the phrase ends, at the end of a word or of the text, in what was added."""
    old, new = spelled(before), spelled(after)
    new = old.rstrip(" ") + new[len(old.rstrip(" ")) :]
    found = []
    padded = " " + new.strip(" ") + " "
    start = padded.find(f" {phrase} ")
    while start >= 0:
        found.append(start + len(phrase))
        start = padded.find(f" {phrase} ", start + 1)
    shift = 0 if not new.startswith(" ") else 1
    return any(end + shift > len(old.rstrip(" ")) for end in found)


def test_the_worked_example():
    both = Automaton(["new york", "york"])
    assert both.found("I saw New  York.") == ("new york", "york")
    assert both.found("newyork") == ()
    assert Automaton(["york"]).found("Yorkshire") == ()
    assert Automaton(["York"]).found("york") == Automaton(["york", "York "]).found("in YORK!") == ("york",)


@given(st.lists(WORDS.filter(normalise), min_size=1, max_size=4), st.text(alphabet="abA ,", max_size=40))
@settings(deadline=None, max_examples=200)
def test_it_finds_what_is_there(phrases, text):
    automaton = Automaton(phrases)
    assert set(automaton.found(text)) == {normalise(p) for p in phrases if contains(text, p)}


@given(st.lists(WORDS.filter(normalise), min_size=1, max_size=4), st.lists(st.text("abA ,", max_size=4), max_size=10))
@settings(deadline=None, max_examples=300)
def test_reading_in_pieces_hits_where_a_phrase_ends(phrases, pieces):
    automaton, state, hits, text, texts = Automaton(phrases), Automaton.begin, [], "", [""]
    for piece in pieces:
        state, hit = advance(automaton, state, spelled(piece))
        hits.append(hit)
        text += piece
        texts.append(text)
    assert hits == naive(automaton.phrases, texts)


@given(st.lists(WORDS.filter(normalise), min_size=1, max_size=4), st.text(alphabet="abA ,", max_size=20))
@settings(deadline=None, max_examples=200)
def test_the_matched_share_is_that_of_the_longest_begun_phrase(phrases, text):
    automaton = Automaton(phrases)
    shares = [0.0]
    letters = " " + spelled(text).lstrip(" ")
    for phrase in automaton.phrases:
        for size in range(1, len(phrase)):
            if letters.endswith(" " + phrase[:size]):
                shares.append(size / len(phrase))
    state = automaton.read(automaton.begin, spelled(text))
    assert automaton.fraction[state] == pytest.approx(max(shares))


def test_phrases_without_letters_are_refused():
    with pytest.raises(PalimpsestError, match=r"the phrase '\.\.\.' has no letter or digit"):
        Automaton(["lyon", "..."])


def test_pieces_are_what_tokens_add_to_a_text():
    by_text = {text: token for token, text in enumerate(ALL.texts) if text}
    assert {" Paris", "Paris", "\n", ", "} <= set(by_text)
    assert all(ALL.blank[token] for token in (0, 1, len(TOKENIZER), len(TOKENIZER) + 2))
    assert ALL.opens[by_text[" Paris"]]
    assert ALL.opens[by_text["."]]
    assert not ALL.opens[by_text["is"]]
    assert ALL.inner[by_text[" x, y. "]]
    assert not ALL.inner[by_text[" Paris"]]
    words = Pieces(build_tokenizer(), 128)
    assert words.texts[10].startswith(" ")
    assert words.texts[10].strip() == build_tokenizer().decode([10])


def test_characters_that_several_tokens_spell_are_read_when_they_are_whole():
    token = {raw: TOKENIZER.convert_tokens_to_ids("".join(BYTES[b] for b in raw)) for raw in RAW}
    assert set(token.values()) <= ALL.broken | {token[b"\xe2\x80\x8b"]}
    text, pending = ALL.read(token[b"\xc3"], ())
    assert (text, pending) == ("", (token[b"\xc3"],))
    assert ALL.read(token[b"\xa9"], pending) == ("é", ())
    assert ALL.read(token[b"\xa9s"], pending) == ("és", ())
    text, pending = ALL.read(token[b"x\xc3"], ())
    assert text == "x"
    assert ALL.read(token[b"\xa9s"], pending) == ("és", ())
    assert ALL.read(token[b"\xc3"], pending) == ("", (*pending, token[b"\xc3"]))
    assert ALL.read(TOKENIZER.convert_tokens_to_ids("a"), pending) == (BROKEN + "a", ())


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=8), st.data())
@settings(deadline=None, max_examples=150)
def test_all_tokens_at_once_are_each_token_by_itself(tokens, data):
    automaton = Automaton(["paris", "new york", "york", "café s", "x y", "par", "sx"])
    state, pending = automaton.begin, ()
    for token in tokens:
        text, pending = ALL.read(token, pending)
        state, _ = advance(automaton, state, spelled(text))
    states, hits = ALL.outcomes(automaton, state, pending)
    for token in range(len(ALL.texts)):
        text = ALL.texts[token] if token >= len(TOKENIZER) else ALL.read(token, pending)[0]
        if pending and token not in ALL.broken:
            text = BROKEN + ALL.texts[token]
        assert (states[token], hits[token]) == advance(automaton, state, spelled(text)), (tokens, token)


def segmentations(target):
    """Every sequence of tokens whose text, normalised, is the target and which ends with its last letter."""
    found = []

    def go(tokens, text):
        if normalise(text) == target:
            found.append(tokens)
            return
        for token, piece in enumerate(ALL.texts[: len(TOKENIZER)]):
            if (
                any(map(str.isalnum, piece))
                and BROKEN not in piece
                and f"{target} ".startswith(normalise(text + piece))
            ):
                go((*tokens, token), text + piece)

    go((), "")
    return found


def test_a_word_is_hit_whichever_tokens_spell_it():
    automaton = Automaton(["paris"])
    ways = segmentations("paris")
    assert len(ways) > 20
    for tokens in ways:
        state = automaton.begin
        for place, token in enumerate(tokens):
            _, hits = ALL.outcomes(automaton, state)
            assert bool(hits[token]) == (place == len(tokens) - 1)
            state, _ = advance(automaton, state, ALL.spelled[token])


def test_nothing_is_hit_without_phrases():
    states, hits = ALL.outcomes(Automaton([]), Automaton.begin)
    assert not hits.any()
    assert np.isin(states, [0, 1]).all()
