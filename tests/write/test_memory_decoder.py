from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import build_model, build_tokenizer
from memorised import data, people, probability, quiet
from palimpsest import cli
from palimpsest.data.loading import write_records
from palimpsest.data.records import Record, Roles
from palimpsest.data.windows import windows
from palimpsest.errors import PalimpsestError
from palimpsest.models.loading import load
from palimpsest.models.mixture import MixtureForCausalLM
from palimpsest.models.model import Model
from palimpsest.report.notes import _drawing
from palimpsest.statistics.datastore import KNNDatastore
from palimpsest.statistics.likelihood import score
from palimpsest.statistics.targets import Soft
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune
from palimpsest.write.knn_lm import KNNLM
from palimpsest.write.memory_decoder import MemoryDecoder, attach, hybrid_loss, memory_of

IDS = torch.tensor([[5, 9, 20, 31, 7, 44], [8, 13, 6, 51, 30, 12]])
LEARNING = Training(learning_rate=5e-3, epochs=15, batch_size=8, warmup_epochs=0.0, weight_decay=0.0)
SHORT = dataclasses.replace(LEARNING, epochs=1)
METHOD = MemoryDecoder(k=8, training=LEARNING)
ROLES = Roles(train=data().train, validation=people()[4:6])


def dense_loss(logits, labels, target, beta):
    """The loss as it is written, on whole distributions."""
    log_p = logits.log_softmax(-1)
    kl = (torch.xlogy(target, target) - target * log_p).sum(-1)
    return beta * kl - (1 - beta) * log_p[torch.arange(len(labels)), labels]


def soft_of(target):
    row, token = target.nonzero(as_tuple=True)
    return Soft(row, token, target[row, token])


def narrow() -> Model:
    """A model of another family and width with the tokenizer of the others."""
    sizes = {"vocab_size": 256, "n_positions": 96, "n_embd": 24, "n_layer": 3, "n_head": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        )
    return Model(network.eval(), build_tokenizer())


@cache
def _taught() -> Model:
    return METHOD.apply(build_model("llama"), ROLES, quiet())


@pytest.fixture
def taught() -> Model:
    """A model with a memory of the people."""
    return _taught().copy()


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_the_worked_example():
    target = torch.zeros(1, 9).double()
    target[0, 3], target[0, 7] = 0.952574, 0.047426
    p = torch.full((1, 9), 0.1 / 7).double()
    p[0, 3], p[0, 7] = 0.6, 0.3
    label = torch.tensor([7])
    found = {beta: hybrid_loss(p.log(), label, soft_of(target), beta).item() for beta in (1.0, 0.0, 0.5)}
    assert found == pytest.approx({1.0: 0.352834, 0.0: 1.203973, 0.5: 0.778403}, abs=1e-6)
    entropy = float(torch.special.entr(target).sum())
    assert entropy == pytest.approx(0.190865, abs=1e-6)
    assert found[0.5] + 0.5 * entropy == pytest.approx(0.873836, abs=1e-6)


@given(st.integers(1, 9), st.integers(2, 40), st.floats(0, 1), st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_the_sparse_loss_and_its_gradient_are_the_dense_ones(count, vocabulary, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(count, vocabulary, generator=generator) * 3).requires_grad_()
    target = torch.rand(count, vocabulary, generator=generator)
    target = target * (target > 0.6)
    target[:, 0] += 0.1
    target = target / target.sum(1, keepdim=True)
    labels = torch.randint(0, vocabulary, (count,), generator=generator)
    expected, found = dense_loss(logits, labels, target, beta), hybrid_loss(logits, labels, soft_of(target), beta)
    assert_close(found, expected, rtol=1e-5, atol=2e-6)
    (gradient,) = torch.autograd.grad(found.mean(), logits)
    right = torch.nn.functional.one_hot(labels, vocabulary)
    assert_close(gradient, (logits.softmax(-1) - beta * target - (1 - beta) * right) / count, rtol=1e-5, atol=1e-6)
    (dense,) = torch.autograd.grad(expected.mean(), logits)
    assert_close(gradient, dense, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_same_however_the_logits_are_summed_up(monkeypatch):
    from palimpsest.write import memory_decoder

    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    target = torch.rand(50, 30, generator=torch.Generator().manual_seed(1)).softmax(1)
    labels = torch.arange(50) % 30
    whole = hybrid_loss(logits, labels, soft_of(target), 0.5)
    monkeypatch.setattr(memory_decoder, "AT_ONCE", 70)
    assert_close(hybrid_loss(logits, labels, soft_of(target), 0.5), whole)


# --- training --------------------------------------------------------------------------------------------------------


def test_it_learns_the_records_and_leaves_the_model_as_it_was(taught, llama):
    assert probability(taught, ROLES.train) > 5 * probability(llama, ROLES.train)
    base = taught.network.member("base")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), llama.network.parameters(), strict=True))
    taught.network.adjust(weight=0.0)
    with torch.no_grad():
        assert torch.equal(taught(input_ids=IDS).logits, llama(input_ids=IDS).logits)


def test_the_memory_says_what_the_neighbours_say(llama):
    """Trained on the neighbours alone it comes nearer to them than when it is trained on the tokens alone."""
    sequences = windows(llama, ROLES.train)
    targets = KNNDatastore.build(llama, sequences, quiet()).targets(quiet(), k=8, temperature=1.0)
    dense = torch.from_numpy(targets.csr.toarray())
    distance = {}
    for beta in (0.0, 1.0):
        training = dataclasses.replace(LEARNING, epochs=40)
        method = MemoryDecoder(k=8, temperature=1.0, alpha=0.5, beta=beta, training=training)
        memory = memory_of(method.apply(llama, ROLES, quiet()))
        with torch.no_grad():
            logits = torch.cat(
                [memory(input_ids=torch.tensor([s.tokens])).logits[0, s.start - 1 : -1] for s in sequences]
            )
        distance[beta] = float(dense_loss(logits, targets.labels.long(), dense, 1.0).mean())
    assert distance[1.0] < 0.7 * distance[0.0]


def test_without_neighbours_it_is_fine_tuning_and_nothing_is_searched(llama, monkeypatch):
    monkeypatch.setattr(KNNDatastore, "build", None)
    memory = memory_of(MemoryDecoder(beta=0.0, alpha=0.5, training=SHORT).apply(llama, ROLES, quiet()))
    tuned = Finetune(training=SHORT).apply(llama, Roles(train=ROLES.train), quiet())
    assert all(torch.equal(a, b) for a, b in zip(memory.network.parameters(), tuned.network.parameters(), strict=True))


def test_targets_stay_with_their_records_however_a_step_is_cut(llama):
    found = []
    for micro_tokens in (30, 100_000):
        training = dataclasses.replace(SHORT, micro_tokens=micro_tokens)
        method = MemoryDecoder(k=8, temperature=1.0, alpha=0.5, training=training)
        found.append(memory_of(method.apply(llama, ROLES, quiet())))
    for a, b in zip(*(m.network.parameters() for m in found), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_long_texts_are_learned_whole(gpt2):
    text = " ".join(f"{r.prompt} {r.answer}" for r in people()) + " "
    long = Record(text=text * 2)
    training = dataclasses.replace(SHORT, max_length=32)
    after = MemoryDecoder(k=8, temperature=1.0, alpha=0.5, training=training).apply(gpt2, Roles(train=[long]), quiet())
    tokens = len(gpt2.tokenizer(long.text)["input_ids"])
    assert tokens > 128
    assert after.ledger.entries[-1].notes["rows"] == tokens - 1


def test_student_and_teacher_can_be_other_models_and_the_student_shorter(llama, tmp_path):
    student = narrow().save_pretrained(tmp_path / "student")
    teacher = build_model("qwen").save_pretrained(tmp_path / "teacher")
    method = MemoryDecoder(k=4, student=str(student), layers=2, teacher=str(teacher), training=SHORT)
    memory = memory_of(method.apply(llama, ROLES, quiet()))
    assert type(memory.network).__name__ == "GPT2LMHeadModel"
    assert memory.network.config.num_hidden_layers == 2


def test_alpha_and_temperature_are_those_of_the_least_validation_loss(taught):
    base, memory = (Model(taught.network.member(name), taught.processor) for name in ("base", "memory"))
    held = windows(base, ROLES.validation)
    first, second = (np.exp(score(model, held, quiet()).log_prob) for model in (base, memory))
    tried = np.linspace(0, 1, 41)
    nll = [-np.log((1 - a) * first + a * second).mean() for a in tried]
    notes = taught.ledger.entries[-1].notes
    assert notes["alpha"] == taught.network.rule.weight == pytest.approx(tried[int(np.argmin(nll))])
    assert notes["validation"]["perplexity on validation"] == pytest.approx(np.exp(nll), rel=1e-4)
    store = KNNDatastore.build(base, windows(base, ROLES.train), quiet())
    assert notes["temperature"] == store.tune(base, held, quiet(), 8).temperature


def test_what_it_notes_is_drawn(taught):
    notes = taught.ledger.entries[-1].notes
    assert _drawing(notes["validation"])
    assert _drawing(notes["sharpness"])
    assert sum(notes["sharpness"]["share of the targets"]) == pytest.approx(1)
    assert 0 < notes["likeliest_token"] <= 1
    assert json.loads(json.dumps(notes)) == notes


def test_a_part_of_train_is_held_out_where_there_is_no_validation(llama):
    roles = Roles(train=ROLES.train)
    method = MemoryDecoder(k=4, held_out=0.25, training=SHORT)
    notes = method.apply(llama, roles, quiet()).ledger.entries[-1].notes
    rows = [len(s.targets) for s in windows(llama, roles.train)]
    assert sum(sorted(rows)[:9]) <= notes["rows"] <= sum(sorted(rows)[-9:]) < sum(rows)
    whole = dataclasses.replace(method, alpha=0.5, temperature=1.0)
    assert whole.apply(llama, roles, quiet()).ledger.entries[-1].notes["rows"] == sum(rows)


# --- one memory, several models --------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_saved_memory_serves_two_models_of_other_widths(taught, tmp_path):
    folder = memory_of(taught).save_pretrained(tmp_path / "memory")
    for base in (build_model("qwen"), narrow()):
        both = attach(base.copy(), load(folder), 0.6)
        expected = 0.4 * base(input_ids=IDS).logits.softmax(-1) + 0.6 * load(folder)(input_ids=IDS).logits.softmax(-1)
        assert_close(both(input_ids=IDS).logits.exp(), expected)
        assert probability(both, ROLES.train) > 5 * probability(base, ROLES.train)
        loaded = load(both.save_pretrained(tmp_path / type(base.network).__name__))
        assert torch.equal(loaded(input_ids=IDS).logits, both(input_ids=IDS).logits)


def test_a_memory_is_attached_without_training_and_without_records(taught, tmp_path):
    for name, saved in (("whole", taught), ("memory", memory_of(taught))):
        folder = saved.save_pretrained(tmp_path / name)
        other = narrow()
        both = MemoryDecoder(memory=str(folder), alpha=0.6).apply(other, Roles(), quiet())
        assert both.ledger.entries[-1].settings["memory"] == str(folder)
        assert both.network.rule.weight == 0.6
        for a, b in zip(
            both.network.member("memory").parameters(), memory_of(taught).network.parameters(), strict=True
        ):
            assert torch.equal(a, b)
    tuned = MemoryDecoder(memory=str(folder)).apply(narrow(), Roles(validation=ROLES.validation), quiet())
    assert len(tuned.ledger.entries[-1].notes["validation"]["perplexity on validation"]) > 30


def test_on_the_command_line(taught, tmp_path, capsys):
    train = write_records(ROLES.train, tmp_path / "train.jsonl") or tmp_path / "train.jsonl"
    for name, model in (("first", build_model("llama")), ("second", narrow())):
        model.save_pretrained(tmp_path / name)
    options = ["--k", "4", "--training.max-steps", "2", "--training.batch-size", "4", "--quiet"]
    made = ["write", "memory-decoder", "--model", str(tmp_path / "first"), "--role", "train", str(train)]
    assert cli.main([*made, "--out", str(tmp_path / "made"), *options]) == 0
    plugged = ["write", "memory-decoder", "--memory", str(tmp_path / "made"), "--model", str(tmp_path / "second")]
    assert cli.main([*plugged, "--alpha", "0.6", "--out", str(tmp_path / "plugged"), "--quiet"]) == 0
    both = load(tmp_path / "plugged")
    assert isinstance(both.network, MixtureForCausalLM)
    first, second = (load(tmp_path / n).network.member("memory") for n in ("made", "plugged"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert cli.main([*made[:4], "--out", str(tmp_path / "none")]) == 2
    assert 'memory-decoder needs the role "train"' in " ".join(capsys.readouterr().err.split())


@torch.no_grad()
def test_decoding_step_by_step_gives_the_full_pass(taught):
    both = attach(narrow(), memory_of(taught), 0.6)
    whole = both(input_ids=IDS).logits
    cache, steps = None, []
    for place in range(IDS.shape[1]):
        step = both(input_ids=IDS[:, place : place + 1], cache=cache, use_cache=True)
        cache = step.cache
        steps.append(step.logits)
    assert len(cache.layers) == 3 + 2
    assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)
    how = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(both.generate(input_ids=IDS, **how), both.generate(input_ids=IDS, use_cache=False, **how))


@torch.no_grad()
def test_sampling_draws_from_the_mixture(taught):
    ids = IDS[:1].repeat(2000, 1)
    torch.manual_seed(0)
    drawn = taught.generate(input_ids=ids, max_new_tokens=1, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)[:, -1]
    p = taught(input_ids=IDS[:1]).logits[0, -1].exp()
    share = torch.bincount(drawn, minlength=256) / 2000
    assert_close(share, p, rtol=0, atol=0.05)


@torch.no_grad()
def test_vocabularies_filled_up_to_other_sizes_are_fitted(taught):
    for size in (250, 300):
        base = build_model("qwen")
        base.network.resize_token_embeddings(size)
        both = attach(base.copy(), memory_of(taught.copy()), 0.5)
        p = both(input_ids=IDS).logits.exp()
        assert p.shape[-1] == size
        assert_close(p.sum(-1), torch.ones(2, 6))
        memory = memory_of(taught)(input_ids=IDS).logits[..., :size].softmax(-1)
        expected = 0.5 * base(input_ids=IDS).logits.softmax(-1)
        assert_close(p[..., :250], expected[..., :250] + 0.5 * memory[..., :250])
        assert_close(p[..., 256:], expected[..., 256:])


# --- bad input -------------------------------------------------------------------------------------------------------


def test_other_tokens_of_the_same_number_are_refused(taught, tmp_path):
    from tokenizers import Tokenizer

    swapped = json.loads(build_tokenizer().backend_tokenizer.to_str())
    words = swapped["model"]["vocab"]
    words["Ada"], words["Ben"] = words["Ben"], words["Ada"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(swapped)), eos_token="<eos>", pad_token="<pad>"
    )
    other = Model(build_model("qwen").network, tokenizer)
    assert len(tokenizer) == len(taught.tokenizer)
    with pytest.raises(PalimpsestError, match=r"tokenizers of base and memory differ in 2 tokens .first: 'Ada'"):
        attach(other, memory_of(taught), 0.5)
    folder = other.save_pretrained(tmp_path / "other")
    for field in ("teacher", "student"):
        with pytest.raises(PalimpsestError, match="base, teacher and student must have the same tokenizer"):
            MemoryDecoder(**{field: str(folder)}, training=SHORT).apply(build_model("llama"), ROLES, quiet())


def test_a_vocabulary_that_lacks_words_of_the_tokenizer_is_refused(taught):
    base = build_model("qwen")
    base.network.resize_token_embeddings(100)
    with pytest.raises(PalimpsestError, match="base has a vocabulary of 100 and memory of 256"):
        attach(base, memory_of(taught), 0.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alpha", 1.5, "alpha is 1.5, expected at most 1"),
        ("alpha", -0.1, "alpha is -0.1, expected at least 0"),
        ("beta", 1.1, "beta is 1.1, expected at most 1"),
        ("temperature", 0.0, "temperature is 0.0, expected above 0"),
        ("k", 0, "k is 0, expected at least 1"),
        ("held_out", 1.0, "held_out is 1.0, expected below 1"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message):
    with pytest.raises(PalimpsestError, match=message):
        MemoryDecoder(**{field: value})


def test_bad_input_is_named_before_any_work(llama, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(KNNDatastore, "build", None)
    rows = sum(len(s.targets) for s in windows(llama, ROLES.train))
    with pytest.raises(PalimpsestError, match=f"k is 5000, expected 1 to {rows - 1}"):
        MemoryDecoder(k=5000).apply(llama, ROLES, quiet())
    with pytest.raises(PalimpsestError, match='needs the role "train"'):
        MemoryDecoder().apply(llama, Roles(), quiet())
    with pytest.raises(PalimpsestError, match=r"which has one record. Give the role validation"):
        MemoryDecoder().apply(llama, Roles(train=ROLES.train[:1]), quiet())
    with pytest.raises(PalimpsestError, match="layers is 3, but LlamaForCausalLM has 2 blocks"):
        MemoryDecoder(layers=3).apply(llama, ROLES, quiet())
    with pytest.raises(PalimpsestError, match="is tuned on the role validation"):
        MemoryDecoder(memory=str(taught.save_pretrained(tmp_path / "m"))).apply(llama, Roles(), quiet())
    with pytest.raises(PalimpsestError, match="does not exist"):
        MemoryDecoder(memory=str(tmp_path / "nowhere"), alpha=0.5).apply(llama, Roles(), quiet())


def test_a_mixture_without_a_memory_cannot_be_attached(llama, tmp_path):
    looking = KNNLM(weight=0.2, temperature=1.0, k=4).apply(llama, ROLES, quiet()).save_pretrained(tmp_path / "knn")
    with pytest.raises(PalimpsestError, match="the mixture has no memory to take out, only base and datastore"):
        MemoryDecoder(memory=str(looking), alpha=0.5).apply(build_model("qwen"), Roles(), quiet())


def test_validation_that_was_learned_is_warned_of(llama):
    roles = Roles(train=ROLES.train, validation=ROLES.train[:2])
    found = MemoryDecoder(k=4, training=SHORT).apply(llama, roles, quiet())
    assert "2 records of validation are in train, too" in found.ledger.entries[-1].notes["warnings"][0]


def test_a_memory_beside_two_bases_stays_in_the_precision_of_the_first():
    first, second, memory = build_model("llama"), build_model("llama"), build_model("llama")
    one = attach(first, memory, 0.5)
    second.network.to(torch.bfloat16)
    two = attach(second, memory, 0.5)
    assert {weight.dtype for weight in one.network.parameters()} == {torch.float32}
    assert {weight.dtype for weight in two.network.parameters()} == {torch.bfloat16}
