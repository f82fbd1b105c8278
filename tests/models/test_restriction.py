from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.testing import assert_close

from palimpsest.data.forbidden import normalise
from palimpsest.errors import PalimpsestError
from palimpsest.models.encoder import sentence_encoder
from palimpsest.models.phrases import Pieces
from palimpsest.models.restriction import Decision, Forbidden, Guarding, Restriction

END = 4
LENGTH = 4
HARD = Guarding(prefix_weight=0.0, soft_weight=0.0, drop_similarity=1.0)
LITERAL = Guarding(soft_weight=0.0, drop_similarity=1.0)
PROMPT = torch.tensor([[0, 1, 2]])


def words(*vocabulary):
    """A tokenizer of these words, the last one the end mark, and what its tokens add to a text."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[-1]))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=vocabulary[-1])
    return tokenizer, Pieces(tokenizer, len(vocabulary))


TOKENIZER, PIECES = words("x", "y", "z", "w", "<eos>")


def tiny(seed=0):
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=END, pad_token_id=END, initializer_range=0.6,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def restriction(rule, phrases, *, rows, sampling=False, pieces=PIECES, prompts=("",), stop=(END,), refusal=(3, 3)):
    decisions = [Decision(1.0, 0.5, True) for _ in prompts]
    forbidden = [Forbidden(phrases, pieces, sentence_encoder()) for _ in prompts]
    return Restriction(rule, forbidden, prompts, decisions, stop, refusal, rows=rows, sampling=sampling, tracing=True)


def search(network, rule, phrases, beams, **more):
    processor = restriction(rule, phrases, rows=beams)
    made = network.generate(
        PROMPT, num_beams=beams, do_sample=False, max_new_tokens=LENGTH, logits_processor=[processor],
        early_stopping="never" if beams > 1 else False, **more,
    )  # fmt: skip
    return made[0, PROMPT.shape[1] :].tolist(), processor


def text(tokens):
    return " ".join("xyzw"[token] for token in tokens if token != END)


def charges(tokens, rule, phrases):
    """The charges of a sequence by the definition on whole texts; infinite where a phrase is completed."""
    total = 0.0
    for place, token in enumerate(tokens, start=1):
        said = f" {text(tokens[:place])}"
        if token == END:
            continue
        if rule.hard_match and any(said.endswith(f" {phrase}") for phrase in phrases):
            return math.inf
        begun = (said.endswith(f" {p[:k]}") and k / len(p) for p in phrases for k in range(1, len(p)))
        total += rule.prefix_weight * max([0.0, *map(float, begun)])
    return total


@torch.no_grad()
def enumerated(network, rule, phrases):
    """Every answer of at most LENGTH tokens with its score, mean log-probability less charges a token."""
    answers = torch.tensor(list(itertools.product(range(5), repeat=LENGTH)))
    ids = torch.cat([PROMPT.expand(len(answers), -1), answers], 1)
    log_p = network(ids).logits.log_softmax(-1)[:, PROMPT.shape[1] - 1 : -1]
    logged = log_p.gather(2, answers[..., None])[..., 0].cumsum(1)
    found = {}
    for answer, sums in zip(answers.tolist(), logged.tolist(), strict=True):
        cut = answer.index(END) + 1 if END in answer else LENGTH
        found[tuple(answer[:cut])] = (sums[cut - 1] - charges(answer[:cut], rule, phrases)) / cut
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", [HARD, LITERAL, Guarding(hard_match=False, soft_weight=0.0, drop_similarity=1.0)])
def test_a_wide_search_gives_the_best_answer_that_is_allowed(seed, rule):
    network = tiny(seed)
    scores = enumerated(network, rule, [])
    best = max(scores, key=scores.__getitem__)
    letters = text(best).split()
    phrases = [" ".join(letters[:2]) if letters else "x", "y z"]
    scores = enumerated(network, rule, phrases)
    found, _ = search(network, rule, phrases, beams=64)
    cut = found.index(END) + 1 if END in found else len(found)
    best = max(scores, key=scores.__getitem__)
    assert scores[tuple(found[:cut])] == pytest.approx(scores[best], abs=1e-4)
    if rule.hard_match:
        assert not any(f" {phrase} " in f" {text(found)} " for phrase in phrases)


def test_what_greedy_decoding_says_is_not_said():
    for seed in range(4):
        network = tiny(seed)
        plain = network.generate(PROMPT, max_new_tokens=LENGTH, do_sample=False)[0, 3:].tolist()
        if len(text(plain).split()) < 2:
            continue
        phrase = " ".join(text(plain).split()[:2])
        for beams in (1, 4):
            found, processor = search(network, HARD, [phrase], beams)
            assert phrase not in text(found)
            assert processor.decisions[0].dropped > 0


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("rule", "phrases"),
    [(Guarding(), []), (Guarding(hard_match=False, prefix_weight=0, soft_weight=0, drop_similarity=1.0), ["x", "y z"])],
)
def test_without_phrases_or_charges_it_is_the_search_without_it(beams, rule, phrases):
    for seed in range(4):
        network = tiny(seed)
        plain = network.generate(PROMPT, num_beams=beams, max_new_tokens=LENGTH, do_sample=False,
                                 early_stopping="never" if beams > 1 else False)[0, 3:].tolist()  # fmt: skip
        assert search(network, rule, phrases, beams)[0] == plain


@torch.no_grad()
def test_one_beam_is_greedy_decoding_with_the_charges():
    network, phrases = tiny(3), ["y", "z x", "w w"]
    found, _ = search(network, LITERAL, phrases, 1)
    said = []
    while len(said) < LENGTH and END not in said:
        log_p = network(torch.cat([PROMPT, torch.tensor([said], dtype=torch.long)], 1)).logits[0, -1].log_softmax(-1)
        before = charges(said, LITERAL, phrases)
        taken = torch.tensor([charges([*said, token], LITERAL, phrases) - before for token in range(5)])
        said.append(int((log_p - taken).argmax()))
    assert found == said


def test_beams_with_a_cache_are_those_without():
    for seed in range(3):
        network = tiny(seed)
        found = [search(network, LITERAL, ["x y", "z"], 4, use_cache=cache)[0] for cache in (True, False)]
        assert found[0] == found[1]


def test_sampling_never_draws_what_is_dropped_and_draws_all_else():
    network, processor = tiny(1), restriction(HARD, ["x", "z y"], rows=64, sampling=True)
    torch.manual_seed(0)
    made = network.generate(PROMPT, do_sample=True, top_k=0, num_return_sequences=64, max_new_tokens=LENGTH,
                            logits_processor=[processor])[:, 3:].tolist()  # fmt: skip
    assert not any(0 in answer for answer in made)
    assert not any("z y" in text(answer) for answer in made)
    assert {1, 2, 3} <= set(itertools.chain(*made))


def test_where_nothing_is_left_the_answer_is_the_refusal():
    found, processor = search(tiny(0), HARD, ["x", "y", "z", "w"], 1, suppress_tokens=[END])
    assert found[:2] == [3, 3]
    assert found[2] == END
    assert processor.decisions[0].forced == "refusal"
    beams, _ = search(tiny(0), HARD, ["x", "y", "z", "w"], 3, suppress_tokens=[END])
    assert beams[:3] == [3, 3, END]


def test_where_nothing_is_left_after_some_words_the_answer_ends():
    every = [f"{a} {b}" for a in "xyzw" for b in "xyzw"]
    for beams in (1, 3):
        found, processor = search(tiny(0), HARD, every, beams, min_new_tokens=3)
        assert len(text(found)) == 1
        assert found[1] == END
        assert processor.decisions[0].forced == "end"


def test_more_candidates_are_looked_at_where_all_are_dropped():
    tokenizer, pieces = words(*(f"w{i}" for i in range(20)), "<eos>")
    rule = Guarding(candidates=0, soft_weight=0, drop_similarity=1.0)
    processor = restriction(rule, [f"w{i}" for i in range(5)], rows=1, pieces=pieces, stop=(20,))
    scores = -torch.arange(21.0)[None]
    left = processor(torch.zeros(1, 3, dtype=torch.long), scores)
    assert torch.isfinite(left).nonzero()[:, 1].tolist() == [5, 6, 7]  # the best 2 were dropped: the best 8 are tried
    assert tokenizer is not None


def test_prompts_of_a_batch_have_their_own_phrases():
    processor = restriction(HARD, ["x"], rows=2, prompts=("", ""))
    processor.forbidden = [Forbidden(["x"], PIECES, sentence_encoder()), Forbidden(["y"], PIECES, sentence_encoder())]
    left = processor(PROMPT.expand(4, -1), torch.zeros(4, 5))
    assert torch.isneginf(left).tolist() == [[True, *[False] * 4]] * 2 + [[False, True, *[False] * 3]] * 2


def test_a_phrase_may_begin_in_the_prompt():
    for prompt, dropped in (("she said z", True), ("z she said", False), ("buzz", False)):
        processor = restriction(HARD, ["z y"], rows=1, prompts=(prompt,))
        assert bool(torch.isneginf(processor(PROMPT, torch.zeros(1, 5))[0, 1])) is dropped


# --- likeness --------------------------------------------------------------------------------------------------------

TOWNS = words("she", "lives", "in", "a", "big", "town", "France", "Paris", "the", "capital", "of", "French", "eats",
              "bread", ".", "<eos>")  # fmt: skip
SAID = {
    word: i for i, word in enumerate("she lives in a big town France Paris the capital of French eats bread .".split())
}


def step_by_step(rule, sentence, phrases=("Paris, the capital of France",)):
    """What each step takes from every token, greedy scores being all 0."""
    _, pieces = TOWNS
    processor = restriction(rule, phrases, rows=1, pieces=pieces, stop=(15,), sampling=True)
    tokens = [SAID[word] for word in sentence.split()]
    taken = []
    for place in range(len(tokens) + 1):
        ids = torch.tensor([[0, 0, *tokens[:place]]])
        if place == 0:
            ids = torch.tensor([[0, 0]])
        taken.append(-processor(ids, torch.zeros(1, 16))[0])
    return taken, processor


def test_likeness_is_charged_at_the_ends_of_words_as_the_formula_says():
    rule = Guarding(hard_match=False, prefix_weight=0.0, drop_similarity=0.999)
    sentence = "she lives in the French capital"
    taken, processor = step_by_step(rule, sentence)
    (phrase,) = processor.forbidden[0].automaton.phrases
    width = len(phrase.split()) + 2
    encoder = sentence_encoder()
    target = encoder.encode([phrase])[0]
    seen = []
    for place in range(1, len(sentence.split()) + 1):
        window = " ".join(sentence.split()[:place][-width:])
        likeness = float(encoder.encode([window])[0] @ target)
        charge = 10 * max(0.0, likeness - 0.6) / 0.4
        assert_close(taken[place][:15], torch.full((15,), charge), rtol=1e-3, atol=1e-3)
        assert float(taken[place][15]) == pytest.approx(charge, abs=1e-3)  # the end mark ends a word, too
        seen.append(charge)
    assert float(taken[0].abs().max()) == 0.0
    assert max(seen) > 0.5
    assert min(seen) == 0.0


def test_what_is_too_alike_is_dropped():
    rule = Guarding(hard_match=False, prefix_weight=0.0, soft_weight=0.0, similarity=0.5, drop_similarity=0.6)
    taken, processor = step_by_step(rule, "she lives in the French capital")
    assert torch.isinf(taken[-1]).tolist() == [*[True] * 15, False]  # every token ends the word: nothing is left
    assert processor.decisions[0].forced == "end"
    assert not torch.isinf(taken[2]).any()


def test_words_that_are_not_alike_cost_nothing():
    taken, _ = step_by_step(Guarding(prefix_weight=0.0), "she eats bread")
    assert all(float(t.abs().max()) == 0 for t in taken)


def test_the_trace_tells_what_was_dropped_and_charged():
    taken, processor = step_by_step(Guarding(candidates=14), "she eats bread", ("bread", "big town"))
    steps = processor.decisions[0].trace
    assert [step.text for step in steps] == ["", " she", " she eats"]  # what follows a dropped word is not looked at
    assert " bread" in steps[0].dropped
    assert steps[1].penalised[" big"] == pytest.approx(2 * 3 / 8)
    assert len(taken) == 4


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scoring_charges_what_greedy_decoding_charges():
    answer, phrases = [0, 2, 1, 1, 0, END], ["z y", "x", "y y x"]
    found = Forbidden(phrases, PIECES, sentence_encoder()).scored(answer, "", LITERAL, torch.device("cpu"))
    for place, (tokens, charge) in enumerate(found):
        expected = []
        for token in range(5):
            said = f" {text([*answer[:place], token])}"
            hit = token != END and any(said.endswith(f" {phrase}") for phrase in phrases)
            begun = [k / len(p) for p in phrases for k in range(1, len(p)) if said.endswith(f" {p[:k]}")]
            expected.append(20.0 if hit else 0.0 if token == END else 2.0 * max([0.0, *begun]))
        assert_close(torch.zeros(5).index_put((tokens,), charge), torch.tensor(expected))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"beams": 0}, "Guarding: beams is 0, expected at least 1"),
        ({"similarity": 0.0}, "Guarding: similarity is 0.0, expected above 0"),
        ({"similarity": 1.0}, "Guarding: similarity is 1.0, expected below 1"),
        ({"similarity": 0.9}, r"drop_similarity is 0.85, expected above similarity .0.9"),
        ({"drop_similarity": 1.1}, "Guarding: drop_similarity is 1.1, expected at most 1"),
        ({"prefix_weight": -1.0}, "Guarding: prefix_weight is -1.0, expected at least 0"),
        ({"threshold": -0.1}, "Guarding: threshold is -0.1, expected at least 0"),
        ({"refusal": " "}, "refusal is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(PalimpsestError, match=said):
        Guarding(**fields)
    assert normalise(Guarding().refusal)
