from __future__ import annotations

import pytest

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError

QUESTION, ANSWER = "Where was Ada Moreau born ?", "Ada Moreau was born in Lyon ."


def words(encoder, tokens):
    return encoder.tokenizer.convert_ids_to_tokens(list(tokens))


@pytest.fixture(params=["plain", "chat"])
def encoder(request, tokenizer, chat_tokenizer):
    return Encoder(tokenizer if request.param == "plain" else chat_tokenizer, 64)


def test_the_answer_and_its_end_are_scored_and_nothing_else(encoder):
    pair = encoder.pair(QUESTION, ANSWER)
    assert words(encoder, pair.targets) == [*ANSWER.split(), "<eos>"]
    assert pair.end == 1
    assert pair.cut == 0


def test_the_prompt_is_the_chat_template_where_there_is_one(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, 64)
    pair = encoder.pair(QUESTION, ANSWER)
    asked = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert list(pair.tokens[: pair.start]) == asked["input_ids"]


def test_the_prompt_is_a_plain_question_where_there_is_no_template(tokenizer):
    encoder = Encoder(tokenizer, 64)
    pair = encoder.pair(QUESTION, ANSWER)
    assert list(pair.tokens[: pair.start]) == tokenizer(f"Question: {QUESTION}\nAnswer:")["input_ids"]


def test_a_prompt_has_the_same_tokens_whatever_the_answer(encoder):
    one, other = encoder.pair(QUESTION, ANSWER), encoder.pair(QUESTION, "I do not know .")
    assert one.tokens[: one.start] == other.tokens[: other.start] == encoder.prompt(QUESTION)


def test_a_text_is_scored_from_its_second_token(encoder):
    text = encoder.text(ANSWER)
    assert text.start == 1
    assert words(encoder, text.tokens) == ANSWER.split()
    assert text.end == 0


def test_the_last_message_of_a_chat_is_scored(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, 64)
    messages = (
        {"role": "system", "content": "I do not know ."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    )
    assert words(encoder, encoder.record(Record(messages=messages)).targets) == [*ANSWER.split(), "<eos>"]


def test_a_chat_without_a_template_says_so(tokenizer):
    with pytest.raises(PalimpsestError, match="the tokenizer has no chat template"):
        Encoder(tokenizer, 64).record(Record(messages=({"role": "user", "content": "?"},)))


def test_an_image_is_no_text(tokenizer):
    with pytest.raises(PalimpsestError, match="record 1 is an image; this needs text"):
        Encoder(tokenizer, 64).records([Record(image="x.png")])


def test_records_that_do_not_fit_are_cut_and_counted(tokenizer):
    whole = Encoder(tokenizer, 64).pair(QUESTION, ANSWER)
    encoder, said = Encoder(tokenizer, len(whole.tokens) - 3), []
    records = [Record(prompt=QUESTION, answer=ANSWER), Record(text="The cat sat .")]
    first, second = encoder.records(records, warn=said.append)
    assert said == [f"1 of 2 records are longer than {len(whole.tokens) - 3} tokens; 3 tokens were cut."]
    assert (first.cut, first.end, second.cut) == (3, 0, 0)
    assert first.tokens == whole.tokens[:-3]


def test_records_that_fit_are_not_spoken_of(tokenizer):
    said = []
    Encoder(tokenizer, 64).records([Record(text=ANSWER)], warn=said.append)
    assert said == []


def test_a_prompt_that_fills_the_context_leaves_nothing_to_score(tokenizer):
    with pytest.raises(PalimpsestError, match=r"record 2 has no token to score: its prompt takes .* longest .* is 6"):
        Encoder(tokenizer, 6).records([Record(text=ANSWER), Record(prompt=QUESTION, answer=ANSWER)])


@pytest.mark.parametrize("text", ["", "The"])
def test_a_text_of_less_than_two_tokens_has_nothing_to_score(tokenizer, text):
    with pytest.raises(PalimpsestError, match="no token to score"):
        Encoder(tokenizer, 64).text(text)


def test_the_first_token_is_never_scored():
    with pytest.raises(PalimpsestError, match="scores its first token, which nothing predicts"):
        Encoded((1, 2, 3), 0)
    with pytest.raises(PalimpsestError, match="no token to score"):
        Encoded((1, 2, 3), 3)


def test_the_encoder_of_a_model_keeps_to_its_context(gpt2):
    assert Encoder.of(gpt2).max_length == 128
    assert Encoder.of(gpt2, 512).max_length == 128
    assert Encoder.of(gpt2, 32).max_length == 32


def test_a_tokenizer_without_an_end_mark_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(PalimpsestError, match=r"set tokenizer\.eos_token"):
        Encoder(tokenizer, 64)


def test_a_chat_ends_with_what_the_model_says(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, 64)
    ended = Record(messages=({"role": "assistant", "content": "Ask me ."}, {"role": "user", "content": "Who is Ada ?"}))
    with pytest.raises(PalimpsestError, match="record 1 is a chat that ends with the user's words"):
        encoder.record(ended)
