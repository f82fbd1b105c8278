from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from conftest import CAUSAL_LMS, SENTENCES, build_model, build_tokenizer
from memorised import quiet
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.data.windows import windows
from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import Difference
from palimpsest.models.datastore import key_place
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.mixture import mixture
from palimpsest.models.model import Model
from palimpsest.statistics import datastore
from palimpsest.statistics.datastore import KNNDatastore, mixed_nll, states, tokenizer_digest

TEXTS = [Record(text=text) for text in SENTENCES]


def sequences_of(model: Model):
    return windows(model, TEXTS, 10, 5)


def built(model: Model, **options):
    return KNNDatastore.build(model, sequences_of(model), quiet(), **options)


@torch.no_grad()
def mlp_inputs(model: Model, tokens) -> torch.Tensor:
    """What goes into the last block's feed-forward layer, by a hook of torch and no part of the library."""
    network = model.network
    block = network.transformer.h[-1] if hasattr(network, "transformer") else network.model.layers[-1]
    seen = []
    hook = block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(input_ids=torch.tensor([tokens]))
    hook.remove()
    return seen[0].view(len(tokens), -1)


# --- the pass --------------------------------------------------------------------------------------------------------


def test_a_key_is_the_state_before_its_token_on_every_architecture(causal_lm):
    sequences = sequences_of(causal_lm)
    store = built(causal_lm)
    assert len(store) == sum(len(s.targets) for s in sequences)
    for number in (0, 3, len(sequences) - 1):
        sequence = sequences[number]
        rows = slice(store.offsets[number], store.offsets[number + 1])
        assert store.rows.values[rows].tolist() == list(sequence.tokens[sequence.start :])
        expected = mlp_inputs(causal_lm, sequence.tokens)[sequence.start - 1 : -1]
        assert_close(store.rows.keys[rows].float(), expected, rtol=2e-3, atol=2e-3)
    assert no_hooks_left(causal_lm.network)


def test_keys_are_halves_and_searched_as_floats(llama):
    store = built(llama)
    assert store.rows.keys.dtype == torch.float16
    near, _ = store.search(store.rows.keys[:7].float(), 1)
    assert near.tolist() == [[0.0]] * 7
    assert store.rows._whole[1].dtype == torch.float32


def test_the_place_of_a_mixture_is_in_the_network_that_it_rests_on(llama):
    second = build_model("llama")
    both = mixture(Difference(), target=llama.copy(), assistant=second)
    assert key_place(llama.network) == "model.layers.1.mlp:input"
    assert key_place(both.network) == "target.model.layers.1.mlp:input"
    assert_close(built(both).rows.keys, built(llama).rows.keys)


def test_a_state_that_is_no_number_or_too_large_is_refused(llama):
    norm = llama.network.model.layers[1].post_attention_layernorm
    with torch.no_grad():
        norm.weight.fill_(1e6)
    with pytest.raises(PalimpsestError, match=r"model.layers.1.mlp:input reach .*, more than float16 holds"):
        built(llama)
    with torch.no_grad():
        norm.weight.fill_(float("nan"))
    with pytest.raises(PalimpsestError, match=r"the hidden states at model.layers.1.mlp:input are not all numbers"):
        built(llama)
    assert no_hooks_left(llama.network)


def test_nothing_to_store_is_refused(llama):
    with pytest.raises(PalimpsestError, match="the datastore would be empty"):
        KNNDatastore.build(llama, [], quiet())


# --- what the neighbours say -----------------------------------------------------------------------------------------


def naive_targets(store: KNNDatastore, k: int, temperature: float) -> torch.Tensor:
    """Row by row, with every distance."""
    keys = store.rows.keys.double()
    result = torch.zeros(len(store), store.origin.vocabulary, dtype=torch.float64)
    for row in range(len(store)):
        distances = (keys - keys[row]).square().sum(1)
        distances[row] = torch.inf
        near = distances.argsort(stable=True)[:k]
        weights = (-distances[near] / temperature).softmax(0)
        for weight, token in zip(weights, store.rows.values[near], strict=True):
            result[row, token] += weight
    return result


def test_the_targets_are_those_of_every_distance_computed_without_the_row_itself(qwen):
    store = built(qwen)
    temperature = store.temperature()
    found = store.targets(quiet(), k=12, temperature=temperature)
    assert_close(
        torch.from_numpy(found.csr.toarray()).double(), naive_targets(store, 12, temperature), rtol=0, atol=2e-3
    )
    assert torch.equal(found.labels, store.rows.values)
    assert found.offsets.tolist() == store.offsets.tolist()


def test_without_excluding_itself_a_row_gives_its_own_answer_away(llama):
    store = built(llama)
    leak = store.targets(quiet(), k=5, temperature=1e-6, self_exclude=False)
    fair = store.targets(quiet(), k=5, temperature=1e-6)
    own = [t.csr.toarray()[np.arange(len(store)), store.rows.values.numpy()].mean() for t in (leak, fair)]
    assert own[0] > 0.9
    assert own[1] < 0.9 * own[0]


def test_repeated_rows_are_counted(llama):
    sequences = [Encoder.of(llama).text(SENTENCES[0])] * 2 + [Encoder.of(llama).text(SENTENCES[3])]
    store = KNNDatastore.build(llama, sequences, quiet())
    assert store.targets(quiet(), k=2, temperature=1.0).repeated == 2 * len(sequences[0].targets)


def test_the_temperature_to_start_from_is_the_median_distance_to_the_eighth_neighbour(llama):
    store = built(llama)
    every = torch.cdist(store.rows.keys.double(), store.rows.keys.double()) ** 2
    eighth = every.sort(1).values[:, 8]
    assert store.temperature() == pytest.approx(float(eighth.median()), rel=1e-4)


def test_targets_are_kept_in_the_folder_of_a_run(llama, tmp_path, monkeypatch):
    run = quiet(folder=tmp_path)
    store = built(llama)
    first = store.targets(run, k=5, temperature=2.0)
    monkeypatch.setattr(datastore, "sparse", None)  # looked up, not computed
    again = store.targets(run, k=5, temperature=2.0)
    assert np.array_equal(first.csr.toarray(), again.csr.toarray())
    elsewhere = KNNDatastore.build(llama, windows(llama, TEXTS, 10, 4), quiet())  # the same tokens, other contexts
    for other, k in ((store, 6), (elsewhere, 5)):
        with pytest.raises(TypeError):
            other.targets(run, k=k, temperature=2.0)


def test_tuning_finds_the_least_nll_of_all_that_is_tried(llama):
    from palimpsest.statistics.likelihood import score

    held = windows(llama, [Record(text="Ada Moreau was born in Porto . It is not known who wrote this letter .")])
    store = built(llama)
    tuned = store.tune(llama, held, quiet(), 6, temperatures=[0.5, 50.0], weights=[0.0, 0.3, 0.9])
    base = score(llama, held, quiet()).log_prob
    ((_, queries),) = states(llama, held, quiet(), "")
    right = torch.tensor(held[0].targets)
    nll = {}
    for temperature in (0.5, 50.0):
        p = store.distribution(queries, 6, temperature)[torch.arange(len(right)), right].double().numpy()
        for weight in (0.0, 0.3, 0.9):
            nll[temperature, weight] = -np.log((1 - weight) * np.exp(base) + weight * p).mean()
    assert (tuned.temperature, tuned.weight) == min(nll, key=nll.__getitem__)
    assert tuned.nll == pytest.approx([nll[tuned.temperature, w] for w in (0.0, 0.3, 0.9)], rel=1e-5)


def test_mixed_nll_at_the_ends_is_that_of_one():
    first, second = np.log([0.5, 0.1]), np.array([np.log(0.2), -np.inf])
    found = mixed_nll(first, second, [0.0, 0.5, 1.0])
    assert found[0] == pytest.approx(-first.mean())
    assert found[1] == pytest.approx(-np.log([0.35, 0.05]).mean())
    assert found[2] == np.inf


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_it_comes_back_from_its_folder_with_keys_mapped_into_memory(llama, tmp_path):
    store = built(llama)
    folder = store.save(tmp_path / "store")
    again = KNNDatastore.load(folder, llama)
    assert isinstance(np.load(folder / "keys.npy", mmap_mode="r"), np.memmap)
    for a, b in ((store.rows.keys, again.rows.keys), (store.rows.values, again.rows.values)):
        assert torch.equal(a, b)
    assert again.origin == store.origin
    assert again.offsets.tolist() == store.offsets.tolist()
    query = store.rows.keys[:5].float() + 0.1
    assert torch.equal(again.distribution(query, 9, 3.0), store.distribution(query, 9, 3.0))
    header = json.loads((folder / "datastore.json").read_text())
    assert (header["width"], header["model"], header["tokenizer"]) == (
        32,
        llama.digest(),
        tokenizer_digest(llama.tokenizer),
    )


def test_built_into_a_folder_it_is_the_same(llama, tmp_path):
    onto_disk = built(llama, folder=tmp_path / "store")
    assert torch.equal(onto_disk.rows.keys, built(llama).rows.keys)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    KNNDatastore.load(tmp_path / "store", llama)
    with pytest.raises(PalimpsestError, match="store already holds files"):
        built(llama, folder=tmp_path / "store")


def test_a_build_that_fails_leaves_nothing(llama, tmp_path):
    with torch.no_grad():
        llama.network.model.layers[1].post_attention_layernorm.weight.fill_(float("nan"))
    with pytest.raises(PalimpsestError, match="not all numbers"):
        built(llama, folder=tmp_path / "store")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stored(llama, tmp_path):
    return built(llama).save(tmp_path / "store")


@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "offsets.npy"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_refused(stored, name, verify):
    path = stored / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PalimpsestError, match=rf"{name} is damaged"):
        KNNDatastore.load(stored, verify=verify)


def test_changed_numbers_are_refused(stored):
    keys = np.load(stored / "keys.npy")
    keys[3, 4] += 1
    np.save(stored / "keys.npy", keys)
    with pytest.raises(PalimpsestError, match=r"keys.npy is damaged: it is not what was saved"):
        KNNDatastore.load(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this version of palimpsest reads up to 1"),
        ({"format": "x"}, "cannot be read as the header of a datastore"),
        ({"rows": 5}, "its arrays are not those that its header describes"),
        ({"width": 31}, "its arrays are not those that its header describes"),
        ({"sequences": 2}, "its sequences do not cover its rows"),
        ({"model": None}, "model is missing"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(stored, change, message):
    header = json.loads((stored / "datastore.json").read_text()) | change
    header = {key: value for key, value in header.items() if value is not None}
    (stored / "datastore.json").write_text(json.dumps(header))
    with pytest.raises(PalimpsestError, match=message):
        KNNDatastore.load(stored)


def test_what_is_no_datastore_is_refused(stored, tmp_path):
    with pytest.raises(PalimpsestError, match=r"is no datastore: it has no datastore.json"):
        KNNDatastore.load(tmp_path / "nowhere")
    (stored / "values.npy").unlink()
    with pytest.raises(PalimpsestError, match=r"is not complete: values.npy is missing"):
        KNNDatastore.load(stored)
    (stored / "datastore.json").write_text("{")
    with pytest.raises(PalimpsestError, match="cannot be read as the header"):
        KNNDatastore.load(stored)


def test_a_datastore_of_another_model_width_or_tokenizer_is_refused(llama, stored):
    import transformers

    with pytest.raises(PalimpsestError, match="the datastore holds the states of another model"):
        KNNDatastore.load(stored, build_model("qwen"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)
    narrow = Model(transformers.LlamaForCausalLM(config).eval(), llama.tokenizer)
    with pytest.raises(PalimpsestError, match="keys of the datastore are 32 wide and the states of the model 16"):
        KNNDatastore.load(stored, narrow)
    with pytest.raises(PalimpsestError, match="keys of the datastore are 32 wide and the states of the model 16"):
        KNNDatastore.load(stored).tune(narrow, sequences_of(narrow), quiet(), 4)
    renamed = build_tokenizer()
    renamed.add_tokens(["zebra"])
    with pytest.raises(PalimpsestError, match="the datastore was made with another tokenizer"):
        KNNDatastore.load(stored, Model(llama.network, renamed))


def test_numbers_out_of_range_are_refused(llama):
    store = built(llama)
    for k in (0, len(store) + 1):
        with pytest.raises(PalimpsestError, match=f"k is {k}, expected 1 to {len(store)}"):
            store.member(k, 1.0)
        with pytest.raises(PalimpsestError, match=f"k is {k}, expected 1 to {len(store)}"):
            store.tune(llama, sequences_of(llama), quiet(), k)
    with pytest.raises(PalimpsestError, match=f"k is {len(store)}, expected 1 to {len(store) - 1}"):
        store.targets(quiet(), k=len(store), temperature=1.0)
    with pytest.raises(PalimpsestError, match="temperature is 0, expected above 0"):
        store.member(3, 0.0)


assert len(CAUSAL_LMS) == 5
