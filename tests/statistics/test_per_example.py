"""Per-example gradients against one example at a time, on every family; fast and slow must be the same numbers."""

from __future__ import annotations

import gc
import weakref
from functools import cache

import pytest
import torch
import transformers
from torch import nn

from conftest import BUILDERS, NEUTRAL, SENTENCES, _text, build_model, build_tokenizer
from memorised import people, quiet
from one_by_one import EVERY, roughened, scale, slow_gradients, some_records
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.model import Model
from palimpsest.statistics import passes
from palimpsest.statistics.examples import Examples, squared_logits
from palimpsest.statistics.per_example import gradient_norms, mean_gradient, stream_gradients, trainable

every_family = pytest.mark.parametrize("name", EVERY)


@cache
def reference(name):
    return slow_gradients(roughened(name), some_records(name))


def streamed(model, records, **fields):
    """Gradients, squares summed over examples, and squared norms, as they stream out."""
    examples, weights = Examples(model, records), trainable(model.network)
    dense = {name: torch.zeros(len(examples), *w.shape, dtype=w.dtype) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    norms = {name: torch.zeros(len(examples), dtype=w.dtype) for name, w in weights.items()}

    def receive(batch, gradient):
        dense[gradient.name][batch.index] = gradient.dense()
        gradient.add_squares(squares[gradient.name])
        norms[gradient.name][batch.index] = gradient.squared_norms()

    run = fields.pop("run", quiet())
    losses = stream_gradients(model, examples, run, receive, **fields)
    return dense, squares, norms, losses, run


@every_family
def test_gradients_squares_and_norms_are_those_of_single_examples(name):
    model, slow = roughened(name), reference(name)
    dense, squares, norms, _, run = streamed(model, some_records(name), batch_size=4)
    assert "warnings" not in run.notes  # the fast way, not one record at a time
    assert dense.keys() == slow.keys()
    size = scale(slow)
    for weight, expected in slow.items():
        torch.testing.assert_close(dense[weight], expected, rtol=1e-4, atol=1e-6 * size)
        torch.testing.assert_close(squares[weight], expected.square().sum(0), rtol=1e-4, atol=1e-6 * size**2)
        whole = expected.flatten(1).square().sum(1)
        torch.testing.assert_close(norms[weight], whole, rtol=1e-4, atol=1e-5 * size**2)


@every_family
def test_nothing_depends_on_batch_size_and_order(name):
    model, records = roughened(name), some_records(name)
    one = streamed(model, records, batch_size=1)
    all_at_once = streamed(model, records[::-1], batch_size=7)
    size = scale(one[0])
    for weight in one[0]:
        torch.testing.assert_close(all_at_once[0][weight].flip(0), one[0][weight], rtol=1e-4, atol=1e-6 * size)
        torch.testing.assert_close(all_at_once[1][weight], one[1][weight], rtol=1e-4, atol=1e-6 * size**2)
    torch.testing.assert_close(all_at_once[3].flip(0), one[3])


@every_family
def test_the_network_is_left_as_it_was(name):
    model = roughened(name)
    model.network.train()
    first = next(model.network.parameters())
    first.requires_grad_(False)
    buffers = {key: value.clone() for key, value in model.network.named_buffers()}
    streamed(model, some_records(name))
    assert model.network.training
    assert [w.requires_grad for w in model.network.parameters()].count(False) == 1
    assert all(w.grad is None for w in model.network.parameters())
    assert all(torch.equal(value, buffers[key]) for key, value in model.network.named_buffers())
    assert no_hooks_left(model.network)


def test_frozen_and_unchosen_weights_are_not_handed_on():
    model = roughened("llama")
    model.network.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    seen = set()
    only = lambda name: "mlp" in name  # noqa: E731
    stream_gradients(model, Examples(model, people()[:2]), quiet(), lambda b, g: seen.add(g.name), only=only)
    assert seen == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")} - {
        "model.layers.0.mlp.up_proj.weight"
    }
    with pytest.raises(PalimpsestError, match="no weight of LlamaForCausalLM is left"):
        gradient_norms(model, people()[:2], quiet(), only=lambda name: False)


def test_a_tied_embedding_counts_once_with_both_its_uses():
    model = roughened("llama")
    assert model.network.lm_head.weight is model.network.model.embed_tokens.weight
    seen = []
    stream_gradients(model, Examples(model, people()[:3]), quiet(), lambda b, g: seen.append(g))
    (tied,) = [gradient for gradient in seen if "embed" in gradient.name or "lm_head" in gradient.name]
    assert tied.outer is not None
    assert tied.rows is not None


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_padding_token_learns_nothing_from_being_read(name):
    model, records = roughened(name), [Record(text="The <pad> cat sat <pad> on the mat"), people()[0]]
    slow, (dense, squares, norms, *_) = slow_gradients(model, records), streamed(model, records)
    key = "model.embed_tokens.weight"
    if name == "qwen":  # not tied, so that nothing else gives that row a gradient
        assert slow[key][:, 0].count_nonzero() == 0
    torch.testing.assert_close(dense[key], slow[key], rtol=1e-4, atol=1e-6 * scale(slow))
    torch.testing.assert_close(squares[key], slow[key].square().sum(0), rtol=1e-4, atol=1e-6 * scale(slow) ** 2)
    torch.testing.assert_close(norms[key], slow[key].flatten(1).square().sum(1), rtol=1e-4, atol=1e-6)


def test_an_expert_that_a_record_does_not_use_has_no_gradient_from_it():
    model, records = roughened("moe"), [Record(text="The cat"), Record(text="A long road"), people()[0]]
    slow, (dense, *_) = slow_gradients(model, records), streamed(model, records)
    for name in (f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate_up", "down")):
        used = slow[name].flatten(2).norm(dim=2) > 0
        assert int(used[0].sum()) == 2  # one token predicts, and goes to two of four experts
        assert torch.equal(dense[name].flatten(2).norm(dim=2) > 0, used)


def test_the_mean_gradient_is_that_of_all_records_together():
    model, records = roughened("gpt2"), some_records("gpt2")
    slow = slow_gradients(model, records, "mean")
    for batch_size in (1, 3, 7):
        found = mean_gradient(model, records, quiet(), batch_size=batch_size)
        for name, gradients in slow.items():
            torch.testing.assert_close(found[name], gradients.mean(0), rtol=1e-4, atol=1e-6 * scale(slow))


def test_norms_come_by_weight_and_as_a_whole():
    model, records, slow = roughened("qwen"), some_records("qwen"), reference("qwen")
    norms = gradient_norms(model, records, quiet())
    assert norms.names == tuple(slow)
    expected = torch.stack([g.flatten(1).norm(dim=1) for g in slow.values()], 1).double()
    torch.testing.assert_close(norms.values, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms.whole(), expected.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_bfloat16_weights_give_float32_gradients():
    model = roughened("llama")
    model.network.to(torch.bfloat16)
    squares = {name: torch.zeros(w.shape) for name, w in model.network.named_parameters()}

    def receive(batch, gradient):
        assert gradient.squared_norms().dtype == torch.float32
        gradient.add_squares(squares[gradient.name])

    stream_gradients(model, Examples(model, people()[:3]), quiet(), receive)
    slow = slow_gradients(model, people()[:3])
    for name, gradients in slow.items():
        expected = float(gradients.float().square().sum())
        assert float(squares[name].sum()) == pytest.approx(expected, rel=0.05)


def test_float16_is_refused():
    model = roughened("llama")
    model.network.to(torch.float16)
    with pytest.raises(PalimpsestError, match=r"embed_tokens.weight is in float16.*float32"):
        gradient_norms(model, people()[:2], quiet())


def test_memory_does_not_grow_with_the_examples():
    model = build_model("llama")
    held: list[weakref.ref] = []

    def most(records):
        held.clear()
        found = 0

        def receive(batch, gradient):
            nonlocal found
            held.append(weakref.ref(gradient))
            found = max(found, sum(ref() is not None for ref in held))

        stream_gradients(model, Examples(model, records), quiet(), receive, batch_size=2)
        return found

    gc.disable()
    try:
        assert most(people()[:4]) == most(people()) == 1
    finally:
        gc.enable()


# --- other families, and what none of them is ------------------------------------------------------------------------


def _fresh(network) -> Model:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    texts = "CausalLM" in type(network).__name__ or "Sequence" in type(network).__name__
    return Model(network.eval(), build_tokenizer() if texts else None)


def _gpt_oss():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**_text(**experts)))


def _gemma3():
    sizes = {"sliding_window": 64, "query_pre_attn_scalar": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_text(**sizes)))


def _convnext():
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2}
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=4, **sizes))


@pytest.mark.parametrize("make", [_gpt_oss, _gemma3, _convnext])
def test_transposed_experts_with_biases_scaled_embeddings_and_grouped_convolutions(make):
    torch.manual_seed(0)
    model = _fresh(make())
    records = some_records("vit" if make is _convnext else "llama")
    slow = slow_gradients(model, records)
    dense, squares, norms, _, run = streamed(model, records)
    assert "warnings" not in run.notes
    for weight, expected in slow.items():
        torch.testing.assert_close(dense[weight], expected, rtol=1e-3, atol=1e-6 * scale(slow))
        torch.testing.assert_close(squares[weight], expected.square().sum(0), rtol=1e-3, atol=1e-6 * scale(slow) ** 2)
        whole = expected.flatten(1).square().sum(1)
        torch.testing.assert_close(norms[weight], whole, rtol=1e-3, atol=1e-5 * scale(slow) ** 2)


def test_a_classifier_of_texts_with_positions_that_all_records_share():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=256, num_labels=4, pad_token_id=0, **sizes)
    model = _fresh(transformers.BertForSequenceClassification(config))
    records = [Record(text=text, label=i % 4) for i, text in enumerate((*SENTENCES[:4], *NEUTRAL[:3]))]
    dense, _, _, losses, run = streamed(model, records)
    assert "warnings" not in run.notes
    for place, record in enumerate(records):
        tokens = torch.tensor([model.tokenizer(record.text)["input_ids"]])
        loss = nn.functional.cross_entropy(model.network(input_ids=tokens).logits, torch.tensor([record.label]))
        torch.testing.assert_close(losses[place], loss.detach())
        weights = dict(model.network.named_parameters())
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            torch.testing.assert_close(dense[name][place], gradient, rtol=1e-3, atol=1e-6)


class _Mixing(nn.Module):
    """Weights that are used behind the back of their module."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.config = network.config
        self.scale = nn.Linear(1, 1, bias=False)

    def forward(self, **inputs):
        output = self.network(**inputs)
        output.logits = output.logits * self.scale.weight
        return output


class _MixingForImageClassification(_Mixing):
    main_input_name = "pixel_values"
    dtype = torch.float32


def test_an_architecture_for_which_it_does_not_hold_is_measured_one_record_at_a_time():
    network = _MixingForImageClassification(roughened("convnet").network)
    records = some_records("convnet")
    slow = slow_gradients(Model(network), records)
    model, run = Model(network), quiet()
    dense, squares, norms, _, _ = streamed(model, records, run=run)
    (warning,) = run.notes["warnings"]
    assert "the gradient of scale.weight in a batch is not that of single records" in warning
    for weight, expected in slow.items():
        torch.testing.assert_close(dense[weight], expected, rtol=1e-4, atol=1e-6 * scale(slow))
        torch.testing.assert_close(squares[weight], expected.square().sum(0), rtol=1e-4, atol=1e-6 * scale(slow) ** 2)
        assert norms[weight].shape == (7,)


class _Scale(nn.Module):
    """A weight with a leading 1 that either meets every record by broadcasting, or is taken by its index."""

    def __init__(self, indexed):
        super().__init__()
        self.indexed = indexed
        self.weight = nn.Parameter(torch.full((1, 4), 1.5))

    def forward(self, x):
        return x * (self.weight[0] if self.indexed else self.weight)


def test_gradients_of_zero_do_not_tell_whether_a_weight_is_broadcast():
    model, records = roughened("vit"), some_records("vit")
    gate = nn.Linear(4, 4, bias=False).requires_grad_(False)
    model.network.classifier = nn.Sequential(model.network.classifier, _Scale(True), gate)
    for value in (0, 1):
        gate.weight.data.copy_(value * torch.eye(4))
        slow = slow_gradients(model, records)
        dense, *_ = streamed(model, records, batch_size=3)
        torch.testing.assert_close(dense["classifier.1.weight"], slow["classifier.1.weight"], rtol=1e-3, atol=1e-6)


class _Tied(nn.Module):
    """One weight in a module that is read off by its inputs and in one that is given copies of it."""

    def __init__(self):
        super().__init__()
        self.scale, self.linear = _Scale(False), nn.Linear(4, 1)
        self.linear.weight = self.scale.weight

    def forward(self, x):
        return self.scale(x).tanh() + self.linear(x)


@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_that_is_used_twice_has_one_gradient_with_both_its_uses(tied):
    model, records = roughened("vit"), some_records("vit")
    scaled = _Scale(False)
    after = [_Tied()] if tied else [scaled, nn.Tanh(), scaled]
    model.network.classifier = nn.Sequential(model.network.classifier, *after)
    slow = slow_gradients(model, records)
    for _ in range(2):
        dense, squares, _, _, run = streamed(model, records, batch_size=3)
        assert "warnings" not in run.notes
        for weight, expected in slow.items():
            torch.testing.assert_close(dense[weight], expected, rtol=1e-3, atol=1e-6 * scale(slow))
            torch.testing.assert_close(squares[weight], expected.square().sum(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_weight_that_all_records_share_may_be_broadcast_or_not(indexed):
    model, records = roughened("vit"), some_records("vit")
    model.network.classifier = nn.Sequential(model.network.classifier, _Scale(indexed))
    slow = slow_gradients(model, records)
    dense, _, _, _, run = streamed(model, records, batch_size=3)  # a first batch, and some after it
    assert "warnings" not in run.notes
    for weight, expected in slow.items():
        torch.testing.assert_close(dense[weight], expected, rtol=1e-3, atol=1e-6 * scale(slow))


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", "model.layers.0.input_layernorm"), ("vit", "vit.embeddings"), ("moe", "model.layers.1.mlp.gate")],
)
def test_a_module_whose_weights_are_broadcast_runs_once_a_batch(name, path):
    model, records = roughened(name), some_records(name)
    streamed(model, records, batch_size=4)  # finds out which do
    runs = []
    hook = model.network.get_submodule(path).register_forward_hook(lambda *call: runs.append(1))
    streamed(model, records, batch_size=4)
    hook.remove()
    batches = len(Examples(model, records).groups(4))
    assert len(runs) == (batches if path != "model.layers.1.mlp.gate" else 2 * batches)


def test_a_layer_that_mixes_the_records_is_noticed(monkeypatch):
    """Were the rows of a batch told apart wrongly, the comparison with single records would show it."""
    right = passes.reader

    def wrong(module):
        read = right(module)
        return (lambda call, n: _rolled(read(call, n))) if isinstance(module, nn.Linear) else read

    def _rolled(pieces):
        for piece in pieces.values():
            if hasattr(piece, "left"):
                object.__setattr__(piece, "left", piece.left.roll(1, 0))
        return pieces

    monkeypatch.setattr(passes, "reader", wrong)
    run = quiet()
    streamed(build_model("llama"), people()[:4], run=run)
    assert "in a batch is not that of single records" in run.notes["warnings"][0]


def test_a_saturated_model_is_no_obstacle():
    model, run = roughened("vit"), quiet()
    with torch.no_grad():
        model.network.classifier.bias[2] += 30  # losses near 0, gradients that are all rounding
    norms = gradient_norms(model, [r for r in some_records("vit") if r.label == 2] * 3, run)
    assert "warnings" not in run.notes
    assert float(norms.losses.max()) < 1e-3


def test_any_loss_of_the_targets_can_be_asked_for():
    model = roughened("vit")
    records = some_records("vit")
    norms = gradient_norms(model, records, quiet(), loss=squared_logits)
    logits = model.network(pixel_values=records[2].image[None]).logits
    torch.testing.assert_close(norms.losses[2], logits.detach().square().sum())
    gradients = torch.autograd.grad(logits.square().sum(), list(model.network.parameters()))
    expected = torch.stack([g.norm() for g in gradients]).norm().double()
    torch.testing.assert_close(norms.whole()[2], expected, rtol=1e-4, atol=0)


def test_gradients_are_taken_also_where_they_are_switched_off(vit):
    records = some_records("vit")
    expected = gradient_norms(vit, records, quiet())
    with torch.no_grad():
        assert torch.equal(gradient_norms(vit, records, quiet()).values, expected.values)
        assert mean_gradient(vit, records, quiet())


def test_wrong_inputs_are_named():
    model = build_model("llama")
    with pytest.raises(PalimpsestError, match="the data set is empty"):
        gradient_norms(model, [], quiet())
    with pytest.raises(PalimpsestError, match="batch_size is 0, expected at least 1"):
        gradient_norms(model, people()[:2], quiet(), batch_size=0)
    with torch.no_grad():
        model.network.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PalimpsestError, match="the loss of record 1 is nan"):
        gradient_norms(model, people()[:1], quiet())


def test_every_family_of_the_fixtures_is_covered():
    assert set(EVERY) == set(BUILDERS)
