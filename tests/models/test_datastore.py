from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from conftest import CAUSAL_LMS, SENTENCES, build_model
from memorised import data, quiet
from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import pack, pad
from palimpsest.data.records import Record
from palimpsest.data.windows import windows
from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import Interpolate
from palimpsest.models.generation import continue_tokens
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.loading import load
from palimpsest.models.mixture import mixture
from palimpsest.models.model import Model
from palimpsest.statistics.datastore import KNNDatastore
from palimpsest.statistics.likelihood import score
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

TEXTS = [Record(text=text) for text in SENTENCES]
IDS = torch.tensor([[5, 9, 20, 31, 7, 44], [8, 13, 6, 51, 30, 12]])


def store_of(model: Model, **options) -> KNNDatastore:
    return KNNDatastore.build(model, windows(model, TEXTS), quiet(), **options)


def looking_up(architecture: str = "llama", weight: float = 0.3, k: int = 20, temperature: float = 4.0) -> Model:
    model = build_model(architecture)
    member = store_of(model).member(k, temperature)
    return mixture(Interpolate(weight=weight), base=model, datastore=Model(member, model.processor))


@pytest.fixture(params=CAUSAL_LMS)
def any_lookup(request):
    return looking_up(request.param)


@torch.no_grad()
def test_the_logits_are_the_mixture_of_the_model_and_its_neighbours(causal_lm):
    store = store_of(causal_lm)
    both = mixture(Interpolate(weight=0.3), base=causal_lm, datastore=Model(store.member(20, 4.0), causal_lm.processor))
    module = causal_lm.network.get_submodule(store.origin.reads.removesuffix(":input"))
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain = causal_lm(input_ids=IDS).logits
    hook.remove()
    p = store.distribution(seen[0].reshape(12, -1), 20, 4.0).view(2, 6, -1)
    assert_close(both(input_ids=IDS).logits.exp(), 0.7 * plain.softmax(-1) + 0.3 * p)
    assert_close(both(input_ids=IDS).logits.double().exp().sum(-1), torch.ones(2, 6).double(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_weight_it_is_the_base_bit_for_bit_and_nothing_is_looked_up(llama):
    both = looking_up(weight=0.0)
    assert torch.equal(both(input_ids=IDS).logits, llama(input_ids=IDS).logits)
    assert both.network.member("datastore")._known[1]._whole is None


@torch.no_grad()
def test_alone_it_never_says_that_a_token_is_impossible(any_lookup):
    any_lookup.network.adjust(weight=1.0)
    logits = any_lookup(input_ids=IDS).logits
    assert torch.isfinite(logits).all()
    assert_close(logits.exp().sum(-1), torch.ones(2, 6))
    found = score(any_lookup, Encoder.of(any_lookup).records(data().forget), quiet())
    assert bool((found.deviation < 1e4).all())


@torch.no_grad()
def test_decoding_step_by_step_gives_the_full_pass(any_lookup):
    whole = any_lookup(input_ids=IDS).logits
    cache, steps = None, []
    for place in range(IDS.shape[1]):
        step = any_lookup(input_ids=IDS[:, place : place + 1], cache=cache, use_cache=True)
        cache = step.cache
        steps.append(step.logits)
    assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padded_batches_are_looked_up_as_each_row_alone(any_lookup):
    prompts = [[5, 9, 20, 31], [8, 13], [6]]
    for left in (True, False):
        fill = [[0] * (4 - len(p)) for p in prompts]
        ids = torch.tensor([[*f, *p] if left else [*p, *f] for f, p in zip(fill, prompts, strict=True)])
        mask = torch.tensor(
            [
                [0] * len(f) + [1] * len(p) if left else [1] * len(p) + [0] * len(f)
                for f, p in zip(fill, prompts, strict=True)
            ]
        )
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = any_lookup(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert torch.isfinite(found).all()
        for row, prompt in enumerate(prompts):
            alone = any_lookup(input_ids=torch.tensor([prompt])).logits[0]
            assert_close(found[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


def test_generation_is_greedy_decoding_without_a_cache_whatever_the_padding(any_lookup):
    prompts = [[5, 9, 20, 31], [8, 13], [6]]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for _ in range(4):
            best = any_lookup(input_ids=tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, best.view(1, 1)], 1)
        expected.append(tokens[0, -4:].tolist())
    ids = torch.tensor([[0] * (4 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in prompts])
    found = any_lookup.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    if not any(any_lookup.tokenizer.eos_token_id in said for said in expected):
        assert found[:, 4:].tolist() == expected
    assert [a[:4] for a in continue_tokens(any_lookup, prompts, quiet(), 4)] == [
        e[: e.index(2)] if 2 in e else e for e in expected
    ]
    assert no_hooks_left(any_lookup.network)


@torch.no_grad()
def test_packed_rows_score_as_single_ones(any_lookup):
    sequences = Encoder.of(any_lookup).records(data().forget)
    apart = torch.cat([pad([s]).target_logits(any_lookup.network) for s in sequences])
    assert_close(pack(sequences).target_logits(any_lookup.network), apart, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_saved_and_loaded_it_looks_up_the_same_and_its_keys_stay_halves(any_lookup, tmp_path):
    folder = any_lookup.save_pretrained(tmp_path / "model")
    for loaded in (load(folder).network, AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(loaded(input_ids=IDS).logits, any_lookup(input_ids=IDS).logits)
    assert load(folder).digest() == any_lookup.digest()
    half = load(folder, run=quiet(precision="bfloat16")).network.member("datastore")
    assert torch.equal(half.keys, any_lookup.network.member("datastore").keys)


@torch.no_grad()
def test_an_approximate_index_is_saved_with_it(llama, tmp_path):
    store = store_of(llama, exact_up_to=50)
    both = mixture(Interpolate(), base=llama, datastore=Model(store.member(5, 1.0), llama.processor))
    loaded = load(both.save_pretrained(tmp_path / "model"))
    assert loaded.digest() == both.digest()
    assert type(loaded.network.member("datastore").rows().index).__name__ == "IndexIVFPQ"
    assert torch.equal(loaded(input_ids=IDS).logits, both(input_ids=IDS).logits)


@torch.no_grad()
def test_how_it_is_asked_can_be_changed_and_the_digest_with_it(tmp_path):
    both = looking_up()
    before, logits = both.digest(), both(input_ids=IDS).logits
    both.network.member("datastore").adjust(temperature=0.01, k=3)
    assert both.digest() != before
    assert not torch.allclose(both(input_ids=IDS).logits, logits)
    loaded = load(both.save_pretrained(tmp_path / "model"))
    assert torch.equal(loaded(input_ids=IDS).logits, both(input_ids=IDS).logits)
    with pytest.raises(PalimpsestError, match="temperature is -1, expected above 0"):
        both.network.member("datastore").adjust(temperature=-1)
    with pytest.raises(PalimpsestError, match="k is 0, expected 1 to"):
        both.network.member("datastore").adjust(k=0)
    both.network.member("datastore").adjust(temperature=4.0, k=20)
    assert both.digest() == before


def test_settings_changed_behind_its_back_are_noticed(tmp_path):
    folder = looking_up().save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["members"][1]["temperature"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PalimpsestError, match="does not have the rule and settings"):
        load(folder)


@torch.no_grad()
def test_keys_that_change_are_noticed():
    both = looking_up()
    before = both(input_ids=IDS).logits
    network = both.network.member("datastore")
    network.values.fill_(9)
    assert both(input_ids=IDS).logits.argmax(-1).eq(9).float().mean() > 0.5
    assert not torch.equal(both(input_ids=IDS).logits, before)


@torch.no_grad()
def test_a_copy_is_independent():
    both = looking_up()
    twin, before = both.copy(), both(input_ids=IDS).logits
    twin.network.member("datastore").keys.zero_()
    assert torch.equal(both(input_ids=IDS).logits, before)
    assert not torch.equal(twin(input_ids=IDS).logits, before)


def test_gradients_reach_the_model_beside_it_and_pass_the_datastore_by():
    both = looking_up()
    loss = both(input_ids=IDS, labels=IDS).loss
    loss.backward()
    weight = both.network.member("base").get_input_embeddings().weight
    assert float(weight.grad.abs().sum()) > 0
    training = Training(learning_rate=1e-3, epochs=1, batch_size=8, warmup_epochs=0.0)
    learned = Finetune(training=training).apply(both, data(), quiet())
    assert learned.digest() != both.digest()
    for name in ("keys", "values"):
        kept, before = (getattr(m.network.member("datastore"), name) for m in (learned, both))
        assert torch.equal(kept, before)


def test_a_network_without_a_feed_forward_layer_is_refused():
    from palimpsest.models.datastore import key_place

    with pytest.raises(PalimpsestError, match="has no feed-forward layer that is known here"):
        key_place(torch.nn.Linear(2, 2))
