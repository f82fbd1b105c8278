from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from conftest import CAUSAL_LMS, build_model, build_tokenizer
from memorised import data, people, probability, quiet, reciting
from palimpsest.data.encoding import Encoder
from palimpsest.data.forbidden import contains
from palimpsest.data.packing import pack, packer, pad
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.erase.guard import Guard
from palimpsest.erase.uld import ULD
from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import Difference
from palimpsest.models.generation import continue_tokens, greedy_answers
from palimpsest.models.guard_index import GuardedConfig
from palimpsest.models.guarded import GuardedForCausalLM
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.loading import load
from palimpsest.models.mixture import mixture
from palimpsest.models.restriction import Guarding
from palimpsest.models.wording import Wording
from palimpsest.statistics.likelihood import ReferencePredictions, score
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

FORGET, RETAIN = data().forget, data().retain
MOST = 10
ALONE = Guarding(scope="item")


@pytest.fixture(scope="module")
def made():
    """A model that recites people, and the same guarded."""
    before = reciting()
    return before, Guard(decoding=ALONE).apply(before, data(), quiet())


@pytest.fixture
def guarded(made):
    """A guarded model of its own."""
    return made[1].copy()


def ids_of(model, prompt):
    return torch.tensor([Encoder.of(model).prompt(prompt)])


def greedy(model, prompt, **more):
    ids = ids_of(model, prompt)
    return model.generate(input_ids=ids, max_new_tokens=MOST, do_sample=False, **more)[0, ids.shape[1] :].tolist()


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 0}, {"num_beams": 3},
                                 {"do_sample": True, "top_k": 0, "num_return_sequences": 3}])  # fmt: skip
def test_what_is_not_guarded_is_generated_as_by_the_model_itself(made, how):
    before, after = made
    for record in RETAIN[:4]:
        found = []
        for model in (before, after):
            torch.manual_seed(5)
            found.append(model.generate(input_ids=ids_of(model, record.prompt), max_new_tokens=MOST, **how))
        assert torch.equal(*found)
        assert not after.network.decisions[0].guarded


def test_everything_asked_for_is_passed_on(made):
    before, after = made
    ids = ids_of(before, RETAIN[0].prompt)
    how = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    plain, guarded = (model.generate(ids, **how) for model in (before, after))
    assert torch.equal(plain.sequences, guarded.sequences)
    assert torch.equal(torch.stack(plain.scores), torch.stack(guarded.scores))


def test_what_is_guarded_is_not_said(made):
    before, after = made
    for record in FORGET:
        (phrases,) = [item["phrases"] for item in after.network.items if item["prompt"] == record.prompt]
        for beams in (None, 1, 3):
            more = {} if beams is None else {"num_beams": beams}
            said = after.tokenizer.decode(greedy(after, record.prompt, **more), skip_special_tokens=True)
            assert not any(contains(said, phrase) for phrase in phrases)
        assert any(contains(before.answer([record.prompt])[0], phrase) for phrase in phrases)
        assert said.startswith(record.subject)  # the rest of the sentence is still there


def test_nothing_that_is_dropped_is_sampled(made):
    _, after = made
    ids = ids_of(after, FORGET[0].prompt)
    torch.manual_seed(0)
    more = {"do_sample": True, "top_k": 0, "temperature": 1.5, "num_return_sequences": 32}
    said = after.tokenizer.batch_decode(after.generate(input_ids=ids, max_new_tokens=MOST, **more)[:, ids.shape[1] :])
    assert not any(contains(text, "Lyon") for text in said)
    assert len(set(said)) > 4


def test_a_threshold_of_0_guards_everything_and_one_above_1_nothing(guarded, made):
    network = guarded.network.adjust(threshold=0.0)
    assert all(network.explain(record.prompt).guarded for record in people())
    network.adjust(threshold=1.5)
    assert not any(network.explain(record.prompt).guarded for record in people())
    assert greedy(guarded, FORGET[0].prompt) == greedy(made[0], FORGET[0].prompt)
    network.adjust(threshold=None)
    assert network.explain(FORGET[0].prompt).guarded


@pytest.mark.parametrize("beams", [1, 4])
def test_without_charges_it_is_the_search_of_the_model_itself(guarded, made, beams):
    guarded.network.adjust(hard_match=False, prefix_weight=0.0, soft_weight=0.0, drop_similarity=1.0, beams=beams)
    for record in FORGET:
        assert greedy(guarded, record.prompt) == greedy(made[0], record.prompt, num_beams=beams)
        assert guarded.network.decisions[0].guarded


def test_prompts_in_batches_are_answered_as_alone_whatever_the_padding(made):
    before, after = made
    prompts = [record.prompt for record in (FORGET[0], RETAIN[0], FORGET[3], RETAIN[5], FORGET[1])]
    tokens = [list(Encoder.of(after).prompt(prompt)) for prompt in prompts]
    width = max(map(len, tokens))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in tokens])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in tokens])
    how = {"max_new_tokens": MOST, "do_sample": False}
    together = after.generate(input_ids=ids, attention_mask=mask, **how)
    alone = {}
    decided = list(after.network.decisions)
    for place, prompt in enumerate(prompts):
        said = greedy(after, prompt)
        assert together[place, width : width + len(said)].tolist() == said
        assert decided[place].probability == pytest.approx(after.network.decisions[0].probability, abs=1e-4)
        alone[prompt] = after.tokenizer.decode(said, skip_special_tokens=True)
    plain = before.generate(input_ids=ids, attention_mask=mask, **how)
    assert torch.equal(together[[1, 3], : plain.shape[1]], plain[[1, 3]])
    assert greedy_answers(after, prompts, quiet(), MOST) == [alone[prompt].strip() for prompt in prompts]


def test_prompts_that_share_a_beginning_are_answered_as_alone(guarded):
    start = Encoder.of(guarded).text(" ".join(["The cat sat on the mat and"] * 3)).tokens
    prompts = [[*start, *Encoder.of(guarded).prompt(record.prompt)] for record in (FORGET[0], RETAIN[0], FORGET[1])]
    guarded.network.adjust(threshold=0.0)
    found = continue_tokens(guarded, prompts, quiet(), 6)
    for prompt, said in zip(prompts, found, strict=True):
        alone = guarded.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert alone[0, len(prompt) : len(prompt) + len(said)].tolist() == said


def test_a_streamed_answer_shows_nothing_before_it_is_decided(made):
    _, after = made

    class Shown:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    ids, shown = ids_of(after, FORGET[0].prompt), Shown()
    made_ids = after.generate(input_ids=ids, max_new_tokens=MOST, do_sample=False, streamer=shown)
    assert shown.tokens == made_ids[0].tolist()
    assert after.network.decisions[0].guarded


def test_a_dictionary_of_both_kinds_of_answers_is_refused(made):
    _, after = made
    tokens = [Encoder.of(after).prompt(record.prompt) for record in (FORGET[0], RETAIN[0])]
    assert len(tokens[0]) == len(tokens[1])
    with pytest.raises(PalimpsestError, match="return_dict_in_generate cannot tell of both"):
        after.generate(input_ids=torch.tensor(tokens), max_new_tokens=2, return_dict_in_generate=True)


# --- scoring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_normalised_and_finite_and_charged_after_the_prompt_only(made):
    before, after = made
    for record in FORGET:
        sequence = Encoder.of(after).record(record)
        ids = torch.tensor([sequence.tokens])
        plain = before(ids).logits[0]
        found = after.network(ids, prompt_lengths=torch.tensor([sequence.start])).logits[0]
        assert_close(found[sequence.start - 1 :].logsumexp(-1), torch.zeros(len(ids[0]) - sequence.start + 1))
        assert torch.isfinite(found).all()
        assert torch.equal(found[: sequence.start - 1], plain[: sequence.start - 1])
        lower = plain.log_softmax(-1) - found.log_softmax(-1)
        (hit,) = [token for token in sequence.targets if after.tokenizer.decode([token]) in ("Lyon", "maker", "Lagos",
                                                                                            "pilot")]  # fmt: skip
        place = sequence.tokens.index(hit, sequence.start) - 1
        assert 0 < float(lower[place, hit]) <= 20


@torch.no_grad()
def test_a_hard_match_costs_the_floor_before_normalising(guarded):
    guarded.network.adjust(prefix_weight=0.0, floor=7.0)
    sequence = Encoder.of(guarded).record(FORGET[0])
    ids, hit = torch.tensor([sequence.tokens]), guarded.tokenizer.convert_tokens_to_ids("Lyon")
    plain = guarded.network.unguarded(ids).logits[0].log_softmax(-1)
    expected = plain.clone()
    expected[sequence.start - 1 :, hit] -= 7
    found = guarded.network(ids, prompt_lengths=torch.tensor([sequence.start])).logits[0]
    assert_close(found[sequence.start - 1 :], expected.log_softmax(-1)[sequence.start - 1 :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_charges_scores_are_those_of_the_model(guarded, made):
    guarded.network.adjust(hard_match=False, prefix_weight=0.0)
    sequences = Encoder.of(guarded).records([*FORGET, *RETAIN])
    found, plain = (score(model, sequences, quiet()).log_prob for model in (guarded, made[0]))
    assert found == pytest.approx(plain, abs=1e-5)


def test_likelihoods_fall_for_what_is_guarded_and_stay_for_the_rest(made):
    before, after = made
    assert probability(after, FORGET) < 0.3 * probability(before, FORGET)
    assert probability(after, RETAIN) == probability(before, RETAIN)


@torch.no_grad()
def test_where_a_prompt_ends_is_found_without_being_told(made):
    _, after = made
    sequence = Encoder.of(after).record(FORGET[0])
    ids = torch.tensor([sequence.tokens])
    told = after.network(ids, prompt_lengths=torch.tensor([sequence.start])).logits
    assert torch.equal(after.network(ids).logits, told)
    text = torch.tensor([after.tokenizer("Where was Ada Moreau born ?")["input_ids"]])
    assert torch.equal(after.network(text).logits, made[0](text).logits)


@torch.no_grad()
def test_rows_positions_and_padding_change_nothing(made):
    _, after = made
    sequences = Encoder.of(after).records([FORGET[0], RETAIN[1], FORGET[3]])
    assert packer(after.network) is pad
    together = pad(sequences).target_logits(after.network)
    apart = torch.cat([pad([s]).target_logits(after.network) for s in sequences])
    assert_close(together, apart, rtol=1e-4, atol=1e-4)
    left = torch.tensor([[0, 0, 0, *sequences[0].tokens]])
    mask = (torch.arange(left.shape[1]) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    start = torch.tensor([sequences[0].start])
    found = after.network(left, attention_mask=mask, position_ids=positions, prompt_lengths=start).logits[0, 3:]
    plain = after.network(torch.tensor([sequences[0].tokens]), prompt_lengths=start).logits[0]
    assert_close(found, plain, rtol=1e-3, atol=1e-3)
    kept = after.network(torch.tensor([sequences[0].tokens]), logits_to_keep=2, prompt_lengths=start).logits[0]
    assert_close(kept, plain[-2:], rtol=1e-4, atol=1e-4)
    with pytest.raises(PalimpsestError, match="attention_mask of one row a sequence"):
        pack(sequences).target_logits(after.network)


def test_scoring_agrees_with_the_greedy_answer(guarded):
    """The most likely token after every beginning of the greedy answer is its next one, without likeness."""
    guarded.network.adjust(soft_weight=0.0, drop_similarity=1.0, beams=1)
    for record in FORGET:
        said = greedy(guarded, record.prompt)
        sequence = [*Encoder.of(guarded).prompt(record.prompt), *said]
        start = len(sequence) - len(said)
        with torch.no_grad():
            best = guarded.network(torch.tensor([sequence]), prompt_lengths=torch.tensor([start])).logits[0].argmax(-1)
        assert best[start - 1 : -1].tolist() == said


# --- index -----------------------------------------------------------------------------------------------------------


def test_it_explains_itself(made):
    network = made[1].network
    found = network.explain(FORGET[0].prompt, max_new_tokens=MOST)
    assert found.guarded
    assert found.probability >= found.threshold
    assert found.similarity[0] == pytest.approx(1, abs=1e-4)
    assert found.phrases == ("lyon",)
    assert found.dropped > 0
    assert not contains(found.answer, "Lyon")
    assert any(" Lyon" in step.dropped for step in found.trace)
    assert found.trace[1].text.strip() == "Ada"
    other = network.explain(RETAIN[0].prompt)
    assert (other.guarded, other.items, other.trace) == (False, (), [])


def test_added_records_are_guarded_and_nothing_else_changes(guarded, made):
    network, new = guarded.network, RETAIN[0]
    before = guarded.digest()
    others = [*FORGET, *RETAIN[2:]]
    answers = {record.prompt: greedy(guarded, record.prompt) for record in others}
    decided = {record.prompt: network.explain(record.prompt) for record in others}
    (name,) = network.add([new], phrases=[["Izmir"]])
    assert guarded.digest() != before
    assert network.explain(new.prompt).guarded
    assert network.explain(new.prompt).phrases == ("izmir",)
    assert network.explain(new.prompt).probability >= network.explain(new.prompt).threshold
    assert not contains(guarded.answer([new.prompt])[0], "Izmir")
    for record in others:
        if name not in network.explain(record.prompt).items:
            assert network.explain(record.prompt) == decided[record.prompt]
            assert greedy(guarded, record.prompt) == answers[record.prompt]
    assert sum(name not in network.explain(record.prompt).items for record in others) == len(others)
    network.remove([name])
    assert not network.explain(new.prompt).guarded
    assert greedy(guarded, new.prompt) == greedy(made[0], new.prompt)


def test_phrases_of_added_records_are_chosen_where_none_are_given(guarded):
    guarded.network.add(RETAIN[:2], retain=RETAIN[2:])
    assert [item["phrases"] for item in guarded.network.items[-2:]] == [["izmir"], ["bell founder"]]


def test_a_removed_item_is_answered_freely_and_its_words_are_gone(guarded, made):
    network, record = guarded.network, FORGET[2]
    name = next(item["id"] for item in network.items if item["prompt"] == record.prompt)
    network.remove([name])
    assert "Lagos" not in json.dumps(network.config.to_dict())
    assert greedy(guarded, record.prompt) == greedy(made[0], record.prompt)
    assert network.explain(FORGET[0].prompt).guarded
    with pytest.raises(PalimpsestError, match="no item has the id"):
        network.remove([name])
    with pytest.raises(PalimpsestError, match="no item would be left"):
        network.remove([item["id"] for item in network.items])


def test_all_that_is_known_about_the_subject_counts(guarded):
    guarded.network.adjust(scope="subject")
    assert guarded.network.explain(FORGET[0].prompt).phrases == ("lyon", "maker")
    assert guarded.network.explain(FORGET[2].prompt).phrases == ("lagos", "river pilot")
    guarded.network.remove([guarded.network.items[1]["id"]])
    assert guarded.network.explain(FORGET[0].prompt).phrases == ("lyon",)


def test_ties_are_retrieved_together(guarded):
    guarded.network.adjust(tie=1.0)
    assert set(guarded.network.explain(FORGET[0].prompt).phrases) == {"lyon", "maker", "lagos", "river pilot"}
    guarded.network.adjust(tie=0.0, items=2)
    assert len(guarded.network.explain(FORGET[0].prompt).items) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"records": []}, "there is nothing to add"),
        ({"records": [FORGET[0]]}, r'"Where was Ada Moreau born \?" is guarded already'),
        ({"records": [RETAIN[0]], "phrases": [[]]}, r'"Where was Elif Kaya born \?" has no phrases'),
        ({"records": [RETAIN[0]], "phrases": [["..."]]}, r"the phrase '...' of .* has no letter or digit"),
        ({"records": [RETAIN[0]], "phrases": [["Elif"]]}, "the phrase 'Elif' is in its own prompt"),
        ({"records": [RETAIN[0]], "phrases": []}, "phrases are given for 0 records, expected 1"),
    ],
)
def test_records_that_cannot_be_added_are_refused(guarded, given, said):
    before = guarded.digest()
    with pytest.raises(PalimpsestError, match=said):
        guarded.network.add(given.pop("records"), **given)
    assert guarded.digest() == before


# --- as a model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", CAUSAL_LMS)
def test_saved_and_loaded_it_is_the_same_in_one_folder(architecture, tmp_path):
    model = Guard().apply(build_model(architecture), data(), quiet())
    ids = torch.tensor([[5, 9, 20, 31, 7, 44]])
    folder = model.save_pretrained(tmp_path / "guarded")
    loaded = load(folder)
    assert loaded.digest() == model.digest()
    assert loaded.parameters == model.parameters == build_model(architecture).parameters
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for record in (FORGET[0], RETAIN[0]):
        assert greedy(loaded, record.prompt) == greedy(model, record.prompt)
        assert loaded.network.explain(record.prompt) == model.network.explain(record.prompt)
    assert AutoModelForCausalLM.from_pretrained(folder).items == model.network.items
    assert load(loaded.save_pretrained(tmp_path / "again")).digest() == model.digest()


def test_what_was_added_is_saved_too(guarded, tmp_path):
    guarded.network.add(RETAIN[:1], phrases=[["Izmir"]])
    guarded.network.remove([guarded.network.items[0]["id"]])
    loaded = load(guarded.save_pretrained(tmp_path / "guarded"))
    assert loaded.digest() == guarded.digest()
    for record in (*FORGET, *RETAIN):
        assert loaded.network.explain(record.prompt) == guarded.network.explain(record.prompt)


def test_an_index_changed_behind_its_back_is_noticed(guarded, tmp_path):
    folder = guarded.save_pretrained(tmp_path / "guarded")
    config = json.loads((folder / "config.json").read_text())
    config["items"][0]["phrases"] = ["nothing"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PalimpsestError, match="does not have the index and settings"):
        load(folder)


def test_another_encoder_is_noticed(guarded):
    guarded.network.config.encoder_width = 100
    with pytest.raises(PalimpsestError, match=r"gives 384 numbers a text, but the index was made with 100"):
        guarded.network.explain(FORGET[0].prompt)


def test_a_copy_is_independent(made):
    twin = made[1].copy()
    before = made[1].digest()
    assert twin.digest() == before
    twin.network.adjust(beams=2)
    twin.network.remove([twin.network.items[0]["id"]])
    assert made[1].digest() == before != twin.digest()
    assert len(made[1].network.items) == 4
    assert made[1].network.rule == ALONE


def test_a_mixture_can_be_guarded_but_a_guarded_model_not_mixed(guarded, tmp_path):
    target = reciting()
    both = mixture(Difference(alpha=0.1), target=target, assistant=build_model("llama"))
    outer = Guard().apply(both, data(), quiet())
    assert not contains(outer.answer([FORGET[0].prompt])[0], "Lyon")
    assert outer.answer([RETAIN[0].prompt]) == both.answer([RETAIN[0].prompt])
    loaded = load(outer.save_pretrained(tmp_path / "m"))
    assert loaded.answer([FORGET[0].prompt]) == outer.answer([FORGET[0].prompt])
    with pytest.raises(PalimpsestError, match="target is guarded: what it says cannot be combined"):
        mixture(Difference(), target=guarded, assistant=build_model("llama"))
    with pytest.raises(PalimpsestError, match="the model is guarded: what it says cannot be combined"):
        ULD(training=Training(epochs=1)).apply(guarded, data(), quiet())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_network_inside_can_be_trained_on(guarded, lora_rank):
    training = Training(learning_rate=1e-3, epochs=1, batch_size=8, lora_rank=lora_rank)
    detector = {name: t.clone() for name, t in guarded.network.detectors.named_buffers()}
    learned = Finetune(training=training).apply(guarded, data(), quiet())
    assert isinstance(learned.network, GuardedForCausalLM)
    assert learned.digest() != guarded.digest()
    assert all(torch.equal(t, detector[name]) for name, t in learned.network.detectors.named_buffers())
    assert no_hooks_left(learned.network)
    assert isinstance(learned.answer([FORGET[0].prompt], 4)[0], str)


def test_its_predictions_can_be_kept_as_a_reference(guarded):
    sequences = Encoder.of(guarded).records(FORGET)
    with torch.no_grad():
        expected = pad([sequences[1]]).target_logits(guarded.network)
    found = ReferencePredictions(guarded, sequences, quiet()).logits(torch.tensor([1]))
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    held = GradientAscent(retain="kl", training=Training(epochs=1, warmup_epochs=0.0)).apply(guarded, data(), quiet())
    assert held.digest() != guarded.digest()


def test_a_gradient_reaches_the_network_through_the_charges(guarded):
    sequence = Encoder.of(guarded).record(FORGET[0])
    logits = pad([sequence]).target_logits(guarded.network)
    torch.nn.functional.cross_entropy(logits, torch.tensor(sequence.targets)).backward()
    assert float(guarded.network.get_input_embeddings().weight.grad.abs().sum()) > 0


def test_wrong_calls_are_refused(guarded):
    network, ids = guarded.network, torch.tensor([[5, 9, 20]])
    with pytest.raises(PalimpsestError, match="takes input_ids"):
        network.generate(max_new_tokens=3)
    with pytest.raises(PalimpsestError, match="takes input_ids"):
        network(inputs_embeds=torch.zeros(1, 2, 32))
    cache = network(ids, use_cache=True).cache
    with pytest.raises(PalimpsestError, match="cannot go on from a cache"):
        network(ids, cache=cache)
    with pytest.raises(PalimpsestError, match=r"the prompt has 2048 tokens; prompt and answer may have 2048"):
        network.generate(input_ids=torch.ones(1, 2048, dtype=torch.long))
    with pytest.raises(PalimpsestError, match="a guarded model has no field 'beam'"):
        network.adjust(beam=3)
    with pytest.raises(PalimpsestError, match="beams is 0, expected at least 1"):
        network.adjust(beams=0)


def test_without_a_detector_or_a_tokenizer_it_says_so(llama):
    config = GuardedConfig(network=llama.network.config.to_dict(), features="encoder", encoder="all-MiniLM-L6-v2",
                           encoder_width=384, width=384, vocab_size=256, max_position_embeddings=2048)  # fmt: skip
    network = GuardedForCausalLM(config, llama.network)
    with pytest.raises(PalimpsestError, match="has no tokenizer to read prompts with"):
        network.explain("Where?")
    network.wording = Wording(build_tokenizer())
    with pytest.raises(PalimpsestError, match="the detector of this guarded model is untrained"):
        network.explain("Where?")


# --- wording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_questions_are_read_out_of_their_template(chat):
    tokenizer = build_tokenizer(chat=chat)
    words = Wording(tokenizer)
    question = "Where was Ada Moreau born ?"
    ids = words.prompt(question)
    assert words.question(words.text(ids)) == question
    assert words.ends([[*ids, 7, 9], [7, 9]]) == [len(ids), 1]
    beginning = "The cat sat on the mat"
    assert words.question(words.text(words.beginning(beginning))) == beginning


def test_of_a_chat_the_last_question_is_read():
    words = Wording(build_tokenizer(chat=True))
    chat = [("user", "Where was Ada Moreau born ?"), ("assistant", "I do not know ."), ("user", QUESTION)]
    messages = [{"role": role, "content": content} for role, content in chat]
    ids = words.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert words.question(words.text(ids)) == QUESTION


QUESTION = "What does Ben Okafor do for a living ?"
