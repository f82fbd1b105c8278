"""Batched greedy generation gives what one prompt at a time gives."""

from __future__ import annotations

import pytest
import torch

from conftest import QUESTIONS, build_model
from memorised import quiet
from palimpsest.errors import PalimpsestError
from palimpsest.models.generation import continue_tokens, greedy_answers


def alone(model, prompt, most):
    """The plain greedy continuation of one prompt, token by token without a cache."""
    tokens = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            best = int(model.network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if best == model.tokenizer.eos_token_id:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


def test_a_batch_with_a_shared_beginning_gives_what_each_prompt_gives_alone(causal_lm, run):
    beginning = list(range(5, 17))
    prompts = [beginning + rest for rest in ([20, 21], [22], [23, 24, 25, 26], [20, 21, 27])]
    expected = [alone(causal_lm, prompt, 6) for prompt in prompts]
    assert continue_tokens(causal_lm, prompts, run, 6) == expected


def test_prompts_of_different_lengths_without_a_shared_beginning(causal_lm, run):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    assert continue_tokens(causal_lm, prompts, run, 5) == [alone(causal_lm, prompt, 5) for prompt in prompts]


def test_equal_prompts_get_equal_answers(llama, run):
    assert len(set(greedy_answers(llama, [QUESTIONS[0]] * 3, run, 5))) == 1


@pytest.mark.parametrize("most", [1, 4])
def test_no_more_tokens_than_asked_for(llama, run, most):
    assert all(len(tokens) <= most for tokens in continue_tokens(llama, [[5, 6], [7, 8, 9]], run, most))


def test_a_row_ends_with_the_first_text_that_ends_it(causal_lm, run):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    whole = continue_tokens(causal_lm, prompts, run, 8)
    ends = [causal_lm.tokenizer.decode(whole[0][2:4]), causal_lm.tokenizer.decode(whole[1][:1])]
    for found, tokens in zip(continue_tokens(causal_lm, prompts, run, 8, ends=ends), whole, strict=True):
        said = [causal_lm.tokenizer.decode(tokens[: count + 1]) for count in range(len(tokens))]
        length = next((i + 1 for i, text in enumerate(said) if any(end in text for end in ends)), len(tokens))
        assert found[:length] == tokens[:length]
        assert set(found[length:]) <= {causal_lm.tokenizer.pad_token_id}


def test_answers_end_where_learned_positions_do():
    model = build_model("gpt2")
    limit = model.network.config.n_positions
    [said] = continue_tokens(model, [[5] * (limit - 3)], quiet(), max_new_tokens=10)
    assert len(said) <= 3
    with pytest.raises(PalimpsestError, match=f"a prompt of {limit} tokens leaves no room"):
        continue_tokens(model, [[5] * limit], quiet(), max_new_tokens=10)


def test_one_question_is_not_taken_apart_into_letters(llama):
    assert llama.answer("Where was Ada born ?", 3) == llama.answer(["Where was Ada born ?"], 3)
