"""Training a memory language model from texts: it learns, it can be resumed, and its perplexity is the audit's."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from conftest import SENTENCES, build_model
from memorised import quiet
from palimpsest.audit.perplexity import Perplexity
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.memory_lm import MIXERS
from palimpsest.train import Training
from palimpsest.write.mom import MixtureOfMemoriesLM
from palimpsest.write.titans import Titans
from palimpsest.write.train_lm import Corpus, Size, TrainLM, ended

TRAINING = Training(learning_rate=1e-2, epochs=12, batch_size=4, warmup_epochs=0.0, micro_tokens=4096)
SMALL = {"size": Size(layers=1, width=32, heads=2), "corpus": Corpus(length=16), "training": TRAINING}
TEXTS = [Record(text=sentence) for sentence in SENTENCES]


@pytest.fixture(scope="module")
def base():
    return build_model("llama")


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_model_with_any_mixer_learns_the_texts(mixer, base):
    data = Roles(train=TEXTS, validation=[Record(text=SENTENCES[0])])
    trained = TrainLM(mixer=mixer, **SMALL).apply(base, data, quiet())
    curve = trained.ledger.entries[-1].notes["validation_perplexity"]
    assert len(curve) == 10
    assert curve[-1] < curve[0] / 2
    assert trained.network.config.mixer == mixer


def test_the_perplexity_in_the_ledger_is_what_the_audit_measures(base):
    kept = [Record(prompt="Where was Ada Moreau born ?", answer="Lyon")]  # scored alike by both: no end mark is added
    trained = TrainLM(**SMALL).apply(base, Roles(train=TEXTS, validation=kept), quiet())
    found = Perplexity().measure(trained, Roles(general=kept), quiet()).values[0].value
    assert trained.ledger.entries[-1].notes["final_perplexity"] == pytest.approx(found, rel=1e-4)


def test_without_validation_texts_the_last_windows_are_kept_for_it(base):
    made = TrainLM(**SMALL | {"corpus": Corpus(length=16, held_out=0.5)}).apply(base, Roles(train=TEXTS), quiet())
    whole = TrainLM(**SMALL | {"corpus": Corpus(length=16, held_out=0.0)}).apply(base, Roles(train=TEXTS), quiet())
    notes, all_notes = made.ledger.entries[-1].notes, whole.ledger.entries[-1].notes
    assert notes["tokens"] < 0.6 * all_notes["tokens"]
    assert "final_perplexity" in notes
    assert "final_perplexity" not in all_notes


def test_a_tokenizer_without_an_end_mark_joins_texts_as_they_are(base):
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.eos_token = None
    assert ended(TEXTS, tokenizer) == TEXTS


def test_every_token_of_every_text_is_trained_on_once(base):
    made = TrainLM(**SMALL | {"corpus": Corpus(length=16, held_out=0.0)}).apply(base, Roles(train=TEXTS), quiet())
    tokens = sum(len(base.tokenizer(record.text)["input_ids"]) + 1 for record in TEXTS)  # an end mark each
    assert made.ledger.entries[-1].notes["tokens"] == TRAINING.epochs * (tokens - 1)


def test_the_end_mark_is_learned(base):
    made = TrainLM(**SMALL).apply(base, Roles(train=[Record(text="The cat sat")] * 8), quiet())
    ids = base.tokenizer("The cat sat", return_tensors="pt")["input_ids"]
    assert int(made(ids).logits[0, -1].argmax()) == base.tokenizer.eos_token_id


def test_a_tokenizer_of_its_own_can_be_made_from_the_texts(base):
    made = TrainLM(**SMALL | {"corpus": Corpus(vocabulary=400)}).apply(base, Roles(train=TEXTS), quiet())
    assert made.network.config.vocab_size == len(made.tokenizer) <= 400
    assert made.tokenizer.eos_token == base.tokenizer.eos_token


def test_the_mixture_of_memories_is_made_as_it_says(base):
    method = MixtureOfMemoriesLM(memories=3, top_k=1, rule="linear", balance=0.02, **SMALL)
    made = method.apply(base, Roles(train=TEXTS), quiet())
    mixer = made.network.layers[0].mixer
    assert (mixer.memories, mixer.top_k, mixer.shared, mixer.rule) == (3, 1, True, "linear")
    assert made.network.config.penalty_weight == 0.02


@pytest.mark.parametrize("variant", ["memory-only", "mac", "mag", "mal"])
def test_every_titans_variant_learns_the_texts_with_the_memory_it_names(variant, base):
    method = Titans(variant=variant, depth=1, chunk=4, window=8, persistent=2, momentum=False, **SMALL)
    made = method.apply(base, Roles(train=TEXTS, validation=[Record(text=SENTENCES[0])]), quiet())
    curve = made.ledger.entries[-1].notes["validation_perplexity"]
    assert curve[-1] < curve[0] / 2
    memory = made.network.layers[0].mixer.memory
    assert (len(memory.memory), memory.chunk, memory.momentum, memory.decay) == (1, 4, False, True)


def test_bad_settings_are_named(base):
    with pytest.raises(PalimpsestError, match="window is a setting of attention; the mixer is mom"):
        TrainLM(mixer="mom", window=4, **SMALL).apply(base, Roles(train=TEXTS), quiet())
    with pytest.raises(PalimpsestError, match=r"no token mixer 'attentoin'. Did you mean"):
        TrainLM(mixer="attentoin", **SMALL).apply(base, Roles(train=TEXTS), quiet())
    with pytest.raises(PalimpsestError, match="no token to score"):
        TrainLM(**SMALL).apply(base, Roles(train=[Record(text="")]), quiet())
    with pytest.raises(PalimpsestError, match=r"top_k is 5, expected at most memories \(4\)"):
        MixtureOfMemoriesLM(top_k=5)
    with pytest.raises(PalimpsestError, match="width 30 does not give 4 heads"):
        TrainLM(**SMALL | {"size": dataclasses.replace(Size(), width=30)}).apply(base, Roles(train=TEXTS), quiet())
