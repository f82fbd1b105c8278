from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from conftest import CAUSAL_LMS, QUESTIONS, build_model, build_tokenizer
from memorised import data, quiet
from palimpsest.data.encoding import Encoder
from palimpsest.data.packing import pack, pad
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.combination import Contrast, Difference, HoldDown, Interpolate, difference, interpolate, kept
from palimpsest.models.generation import continue_tokens
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.loading import load
from palimpsest.models.memory_lm import MemoryForCausalLM, MemoryLMConfig
from palimpsest.models.mixture import MixtureCache, mixture
from palimpsest.models.model import Model
from palimpsest.statistics.likelihood import ReferencePredictions, score
from palimpsest.training.settings import Training
from palimpsest.write.finetune import Finetune

# --- the model -------------------------------------------------------------------------------------------------------


def other_than(model: Model) -> Model:
    """A copy whose last block is another."""
    changed = model.copy()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in anatomy(changed.network).blocks()[-1].tensors().values():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return changed


def mixed(architecture: str = "llama", rule: object = None) -> Model:
    target = build_model(architecture)
    return mixture(rule or Difference(alpha=0.9), target=target, assistant=other_than(target))  # type: ignore[arg-type]


@pytest.fixture(params=CAUSAL_LMS)
def any_mixture(request):
    return mixed(request.param)


IDS = torch.tensor([[5, 9, 20, 31, 7, 44], [8, 13, 6, 51, 30, 12]])


@torch.no_grad()
def naive_greedy(model, tokens, most):
    """Greedy decoding by whole forward passes without a cache."""
    tokens = torch.tensor([tokens])
    for _ in range(most):
        best = model(input_ids=tokens, use_cache=False, decoding=True).logits[0, -1].argmax()
        tokens = torch.cat([tokens, best.view(1, 1)], 1)
    return tokens[0, -most:].tolist()


@torch.no_grad()
def test_the_logits_are_the_rule_on_the_members_logits(any_mixture):
    target, assistant = (any_mixture.network.member(name) for name in ("target", "assistant"))
    expected = difference(target(IDS).logits, assistant(IDS).logits, 0.9, 0.01)
    assert_close(any_mixture(IDS).logits, expected)
    assert not torch.allclose(expected, target(IDS).logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "alone"),
    [
        (Difference(alpha=0), "target"),
        (HoldDown(alpha=0), "target"),
        (Contrast(alpha=0), "target"),
        (Interpolate(weight=0), "target"),
        (Interpolate(weight=1), "assistant"),
    ],
)
def test_a_member_that_counts_alone_decides_bit_by_bit_and_the_other_is_not_run(rule, alone):
    model = mixed(rule=rule)
    found = model(input_ids=IDS, use_cache=True)
    assert torch.equal(found.logits, model.network.member(alone)(IDS).logits)
    assert list(found.cache.members) == [alone]
    expected = model.network.member(alone).generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), expected)


@torch.no_grad()
def test_decoding_step_by_step_with_a_cache_gives_the_full_pass(any_mixture):
    whole = any_mixture(input_ids=IDS, decoding=True).logits
    cache, steps = None, []
    for place in range(IDS.shape[1]):
        step = any_mixture(input_ids=IDS[:, place : place + 1], cache=cache, use_cache=True, decoding=True)
        cache = step.cache
        steps.append(step.logits)
    assert isinstance(cache, MixtureCache)
    assert cache.get_seq_length() == IDS.shape[1]
    assert len(cache.layers) == sum(len(member.layers) for member in cache.members.values()) == 4
    assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_greedy_generation_is_naive_greedy_decoding_whatever_the_padding(any_mixture):
    prompts = [[5, 9, 20, 31], [8, 13], [6]]
    expected = [naive_greedy(any_mixture, prompt, 5) for prompt in prompts]
    ids = torch.tensor([[0] * (4 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (4 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = any_mixture.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert found[:, 4:].tolist() == expected


@pytest.mark.parametrize("how", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 0}])
def test_beam_search_and_sampling_reorder_all_caches(any_mixture, how):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(any_mixture.generate(input_ids=IDS, max_new_tokens=6, use_cache=use_cache, **how))
    assert torch.equal(*found)


@pytest.mark.parametrize("mixer", ["attention", "gated-delta"])
def test_beam_search_reorders_the_memories_of_members_that_keep_their_own_cache(mixer):
    def member(seed):
        config = MemoryLMConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mixer=mixer,
            initializer_range=0.5,
        )
        torch.manual_seed(seed)
        return Model(MemoryForCausalLM(config).eval(), build_tokenizer())

    network = mixture(Interpolate(weight=0.4), base=member(1), memory=member(2)).network
    found = [
        network.generate(input_ids=IDS, max_new_tokens=12, num_beams=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)


def test_what_is_done_to_the_cache_is_done_to_all_members(any_mixture):
    cache = any_mixture.network(input_ids=IDS, use_cache=True).cache
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    last = any_mixture.network(input_ids=IDS[[1, 0], 4:5], cache=cache).logits[:, -1]
    assert_close(last, any_mixture.network(input_ids=IDS[[1, 0], :5]).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_tokens_that_the_filter_drops_are_never_sampled():
    model = mixed(rule=Difference(alpha=0.9, rate=0.5))
    torch.manual_seed(0)
    generated = model.generate(input_ids=IDS[:1].repeat(64, 1), max_new_tokens=1, do_sample=True, top_k=0)[:, -1]
    keep = kept(model.network.member("target")(IDS[:1]).logits[0, -1], 0.5, 128)
    assert len(set(generated.tolist())) > 3
    assert bool(keep[generated].all())


def test_answers_in_batches_with_a_shared_beginning_are_those_of_each_alone():
    model, beginning = mixed("qwen"), list(range(5, 17))
    prompts = [beginning + rest for rest in ([20, 21], [22], [23, 24, 25, 26])]
    expected = [naive_greedy(model, prompt, 5) for prompt in prompts]
    assert [answer[:5] for answer in continue_tokens(model, prompts, quiet(), 5)] == expected


@torch.no_grad()
def test_packed_rows_score_as_single_ones(any_mixture):
    sequences = Encoder.of(any_mixture).records(data().forget)
    apart = torch.cat([pad([s]).target_logits(any_mixture.network) for s in sequences])
    assert_close(pack(sequences).target_logits(any_mixture.network), apart, rtol=1e-3, atol=1e-4)
    targets = torch.tensor([t for s in sequences for t in s.targets])
    expected = apart.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert score(any_mixture, sequences, quiet()).log_prob == pytest.approx(expected.numpy(), rel=1e-3)


@torch.no_grad()
def test_logits_to_keep_and_labels():
    model = mixed()
    whole = model(input_ids=IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert_close(whole.loss, expected)
    assert_close(model(input_ids=IDS, logits_to_keep=2).logits, whole.logits[:, -2:])
    assert_close(model(input_ids=IDS, logits_to_keep=torch.tensor([1, 3])).logits, whole.logits[:, [1, 3]])


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_in_one_folder(any_mixture, tmp_path):
    folder = any_mixture.save_pretrained(tmp_path / "mixture")
    loaded = load(folder)
    assert loaded.digest() == any_mixture.digest()
    assert loaded.parameters == any_mixture.parameters
    assert torch.equal(loaded(input_ids=IDS).logits, any_mixture(input_ids=IDS).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain(input_ids=IDS).logits, any_mixture(input_ids=IDS).logits)
    assert loaded.copy().save_pretrained(tmp_path / "again").is_dir()
    with safe_open(next(folder.glob("*.safetensors")), "pt") as first:
        with safe_open(next((tmp_path / "again").glob("*.safetensors")), "pt") as second:
            assert set(first.keys()) == set(second.keys())


def test_equal_tensors_are_kept_once(any_mixture):
    target, assistant = any_mixture.network.member("target"), any_mixture.network.member("assistant")
    assert assistant.get_input_embeddings().weight is target.get_input_embeddings().weight
    of_target = sum(weight.numel() for weight in target.parameters())
    changed = sum(tensor.numel() for tensor in anatomy(target).blocks()[-1].tensors().values())
    assert any_mixture.parameters <= of_target + changed


def test_a_copy_is_independent(llama):
    model = mixture(Difference(), target=llama, assistant=other_than(llama))
    twin, before = model.copy(), model.digest()
    assert twin.digest() == before
    with torch.no_grad():
        next(twin.network.parameters()).add_(1)
    assert twin.digest() != before == model.digest()


def test_settings_change_without_training_and_the_digest_with_them(tmp_path):
    model = mixed()
    before, logits = model.digest(), model(input_ids=IDS).logits
    model.network.adjust(alpha=0.1)
    assert model.digest() != before
    assert not torch.allclose(model(input_ids=IDS).logits, logits)
    assert torch.equal(load(model.save_pretrained(tmp_path / "m"))(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.network.adjust(alpha=0.9)
    assert model.digest() == before
    with pytest.raises(PalimpsestError, match="the rule difference has no field 'beta'"):
        model.network.adjust(beta=1)
    with pytest.raises(PalimpsestError, match="alpha is -1, expected at least 0"):
        model.network.adjust(alpha=-1)


def test_the_ledger_says_what_was_adjusted_and_by_what_the_model_was_made(tmp_path):
    model = mixed()
    made, before = model.ledger.made_by, model.digest()
    again = model.adjust(alpha=0.1)
    assert again is model
    last = load(model.save_pretrained(tmp_path / "m")).ledger.entries[-1]
    assert (last.method, last.settings) == ("adjust", {"alpha": 0.1})
    assert (last.weights_before, last.weights_after) == (before, model.digest())
    assert model.ledger.made_by == made
    with pytest.raises(PalimpsestError, match="LlamaForCausalLM has no settings to change: it is no mixture"):
        model.adjust("target", alpha=0.1)
    with pytest.raises(PalimpsestError, match="alpha is -1, expected at least 0"):
        model.adjust(alpha=-1)
    assert model.ledger.entries[-1] == last, "what failed is not noted"


def test_settings_changed_behind_its_back_are_noticed(tmp_path):
    folder = mixed().save_pretrained(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["alpha"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PalimpsestError, match="does not have the rule and settings that this mixture was saved with"):
        load(folder)


@torch.no_grad()
def test_scores_are_log_probabilities_of_each_and_of_all():
    model = mixed()
    found = model.network.scores(input_ids=IDS)
    assert list(found) == ["target", "assistant", "mixture"]
    assert_close(found["mixture"], model(input_ids=IDS).logits.log_softmax(-1))
    assert_close(found["target"], model.network.member("target")(IDS).logits.log_softmax(-1))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_can_be_trained_like_any_other_model(lora_rank, tmp_path):
    model, records = mixed(), data()
    training = Training(learning_rate=1e-3, epochs=2, batch_size=8, lora_rank=lora_rank)
    learned = Finetune(training=training).apply(model, records, quiet())
    sequences = Encoder.of(model).records(records.train)
    assert score(learned, sequences, quiet()).nll().sum() < score(model, sequences, quiet()).nll().sum()
    assert no_hooks_left(learned.network)
    assert load(learned.save_pretrained(tmp_path / "m")).digest() == learned.digest()


def test_its_predictions_can_be_kept_as_a_reference():
    model = mixed()
    sequences = Encoder.of(model).records(data().forget)
    with torch.no_grad():
        expected = pad([sequences[1]]).target_logits(model.network)
    found = ReferencePredictions(model, sequences, quiet()).logits(torch.tensor([1]))
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    held = GradientAscent(retain="kl", training=Training(epochs=1, warmup_epochs=0.0)).apply(model, data(), quiet())
    assert held.digest() != model.digest()


@torch.no_grad()
def test_a_mixture_of_a_mixture(tmp_path):
    inner = mixed()
    outer = mixture(Interpolate(weight=0.5), first=inner, second=build_model("llama"))
    expected = interpolate(inner(input_ids=IDS).logits, build_model("llama")(input_ids=IDS).logits, 0.5)
    assert_close(outer(input_ids=IDS).logits, expected)
    loaded = load(outer.save_pretrained(tmp_path / "m"))
    assert loaded.digest() == outer.digest()
    greedy = {"max_new_tokens": 5, "do_sample": False}
    expected = outer.generate(input_ids=IDS, use_cache=False, **greedy)
    assert torch.equal(loaded.generate(input_ids=IDS, num_beams=1, **greedy), expected)


@torch.no_grad()
def test_what_an_inner_mixture_drops_is_not_generated_by_the_outer_one(tmp_path):
    inner = mixed(rule=Difference(alpha=0.9, rate=0.5))
    outer = mixture(Contrast(alpha=0.2, rate=0.0), first=inner, second=build_model("llama"))
    dropped = inner(input_ids=IDS, decoding=True).logits.isinf()
    assert bool(dropped.any())
    assert torch.equal(outer(input_ids=IDS, decoding=True).logits.isinf(), dropped)
    assert torch.isfinite(outer(input_ids=IDS).logits).all()
    outer.network.member("first").adjust(alpha=0.1)
    folder = outer.save_pretrained(tmp_path / "m")
    assert torch.equal(load(folder)(input_ids=IDS).logits, outer(input_ids=IDS).logits)
    config = json.loads((folder / "config.json").read_text())
    config["members"][0]["settings"]["alpha"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PalimpsestError, match="does not have the rule and settings"):
        load(folder)


@torch.no_grad()
def test_precision_and_attention_that_are_asked_for_reach_the_members(tmp_path):
    folder = mixed().save_pretrained(tmp_path / "m")
    half = load(folder, run=quiet(precision="bfloat16"))
    assert {weight.dtype for weight in half.network.parameters()} == {torch.bfloat16}
    assert half(input_ids=IDS).logits.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert [plain.member(name).config._attn_implementation for name in ("target", "assistant")] == ["eager", "eager"]


# --- a member that reads hidden states -------------------------------------------------------------------------------


class NeighboursConfig(PreTrainedConfig):
    model_type = "test_neighbours"
    reads: str = "model.layers.1.post_attention_layernorm"
    vocab_size: int = 256
    hidden_size: int = 32
    entries: int = 1


class NeighboursForCausalLM(PreTrainedModel):
    """The tokens that followed the nearest of stored states (kNN-LM)."""

    config_class = NeighboursConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("keys", torch.zeros(config.entries, config.hidden_size))
        self.register_buffer("values", torch.zeros(config.entries, dtype=torch.long))
        self.post_init()

    def forward(self, states):
        closeness = (-(torch.cdist(states, self.keys.expand(len(states), -1, -1)) ** 2)).softmax(-1)
        p = states.new_zeros(*states.shape[:2], self.config.vocab_size)
        return CausalLMOutput(logits=p.scatter_add(-1, self.values.expand(closeness.shape), closeness).log())


AutoConfig.register("test_neighbours", NeighboursConfig)
AutoModelForCausalLM.register(NeighboursConfig, NeighboursForCausalLM)


@torch.no_grad()
def test_a_member_can_be_a_memory_that_reads_hidden_states(llama, tmp_path):
    states = llama.network.model(IDS, output_hidden_states=True)
    block = llama.network.model.layers[1]
    hidden = states.hidden_states[1]
    attended = (
        hidden
        + block.self_attn(
            block.input_layernorm(hidden),
            position_embeddings=llama.network.model.rotary_emb(hidden, torch.arange(6)[None]),
            attention_mask=None,
        )[0]
    )
    keys = block.post_attention_layernorm(attended)[:, :-1].flatten(0, 1)
    memory = NeighboursForCausalLM(NeighboursConfig(entries=len(keys)))
    memory.keys.copy_(keys)
    memory.values.copy_(IDS[:, 1:].flatten())
    model = mixture(Interpolate(weight=0.25), base=llama, memory=Model(memory, llama.tokenizer))
    plain, found = llama(input_ids=IDS).logits.softmax(-1), model(input_ids=IDS).logits.exp()
    assert_close(found.sum(-1), torch.ones(2, 6))
    right = [x[:, :-1].gather(-1, IDS[:, 1:, None]) for x in (plain, found)]
    assert bool((right[1] > 0.2 + 0.7 * right[0]).all())  # the memory recites what it stored
    assert_close(model(input_ids=IDS, logits_to_keep=2).logits.exp(), found[:, -2:])
    loaded = load(model.save_pretrained(tmp_path / "m"))
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        loaded.generate(input_ids=IDS[:, :2], **greedy), model.generate(input_ids=IDS[:, :2], use_cache=False, **greedy)
    )
    only = model.network.adjust(weight=1.0)(input_ids=IDS).logits.exp()
    assert_close(only.sum(-1), torch.ones(2, 6))
    assert no_hooks_left(model.network)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_members_that_do_not_fit_are_refused(llama):
    wider = build_model("llama")
    wider.network.resize_token_embeddings(300)
    with pytest.raises(PalimpsestError, match="target has a vocabulary of 256 and assistant of 300; a mixture needs"):
        mixture(Difference(), target=llama, assistant=wider)
    renamed = build_tokenizer()
    renamed.add_tokens(["zebra"])
    with pytest.raises(PalimpsestError, match=r"tokenizers of target and assistant differ in 1 tokens .first: 'zebra'"):
        mixture(Difference(), target=llama, assistant=Model(llama.network, renamed))
    half = build_model("llama")
    half.network.to(torch.bfloat16)
    with pytest.raises(PalimpsestError, match="number type of target is float32 and of assistant bfloat16"):
        mixture(Difference(), target=llama, assistant=half)
    with pytest.raises(PalimpsestError, match="a mixture has two members, 1 were given"):
        mixture(Difference(), target=llama)
    with pytest.raises(PalimpsestError, match="a member of a mixture cannot be called 'config'"):
        mixture(Difference(), target=llama, config=build_model("llama"))


def test_what_a_mixture_cannot_take_is_refused():
    model = mixed()
    with pytest.raises(PalimpsestError, match="cache is a DynamicCache; a mixture keeps one cache a member"):
        model(input_ids=IDS, cache=DynamicCache())
    with pytest.raises(PalimpsestError, match="a mixture takes input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(PalimpsestError, match="cache_implementation is 'static'; a mixture keeps one dynamic cache"):
        model.generate(input_ids=IDS, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(PalimpsestError, match=r"the mixture has no member 'asistant'. Did you mean"):
        model.network.member("asistant")


def test_an_answer_can_be_asked_for_as_of_any_model():
    assert isinstance(mixed().answer([QUESTIONS[0]], max_new_tokens=3)[0], str)
