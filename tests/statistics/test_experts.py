from __future__ import annotations

import pytest
import torch
import transformers

from conftest import _text, build_tokenizer
from memorised import people, quiet
from one_by_one import roughened, some_records
from palimpsest.data.encoding import Encoder
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.models.model import Model
from palimpsest.statistics.experts import expert_usage, routing


def slow_usage(model, records, layer):
    """Affinity, share and counts of one layer, a record at a time, from the router's own weight."""
    router = model.network.model.layers[layer].mlp.gate
    affinity, share, chosen = torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.long)
    for record in records:
        seen = []
        handle = router.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        tokens = Encoder.of(model).record(record).tokens
        with torch.no_grad():
            model.network(input_ids=torch.tensor([tokens]))
        handle.remove()
        p = (seen[0].reshape(len(tokens), -1) @ router.weight.detach().T).softmax(-1)
        top, places = p.topk(2)
        g = torch.zeros_like(p).scatter(1, places, top / top.sum(-1, keepdim=True))
        affinity += g.mean(0) / len(records)
        share += p.mean(0) / len(records)
        chosen += torch.bincount(places.flatten(), minlength=4)
    return affinity, share, chosen


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_usage_is_that_of_single_records(batch_size):
    model, records = roughened("moe"), some_records("moe")
    found = expert_usage(model, records, quiet(), batch_size=batch_size)
    assert found.routers == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    for layer in (0, 1):
        affinity, share, chosen = slow_usage(model, records, layer)
        torch.testing.assert_close(found.affinity[layer], affinity, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.share[layer], share, rtol=1e-4, atol=1e-6)
        assert found.chosen[layer].tolist() == chosen.tolist()
    assert found.tokens == sum(len(Encoder.of(model).record(record).tokens) for record in records)
    assert found.top_k == 2
    assert no_hooks_left(model.network)


def test_affinities_add_up_to_the_mass_of_the_chosen(moe):
    found = expert_usage(moe, people()[:4], quiet())
    torch.testing.assert_close(found.affinity.sum(1), torch.ones(2))  # this model scales the chosen to 1
    torch.testing.assert_close(found.share.sum(1), torch.ones(2))
    assert found.chosen.sum(1).tolist() == [2 * found.tokens] * 2


def test_the_ranking_goes_over_all_layers(moe):
    found = expert_usage(moe, people()[:4], quiet())
    ranked = found.ranked()
    assert len(ranked) == 8
    values = [float(found.affinity[found.routers.index(router), expert]) for router, expert in ranked]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**_text(num_local_experts=4, num_experts_per_tok=2))
        ),
        lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**_text(num_experts=4, num_experts_per_tok=2))),
        lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**_text(num_local_experts=4, num_experts_per_tok=2, sliding_window=64))
        ),
    ],
)
def test_other_families_of_mixtures(make):
    model = Model(make().eval(), build_tokenizer())
    found = expert_usage(model, people()[:3], quiet())
    assert found.affinity.shape == (2, 4)
    torch.testing.assert_close(found.share.sum(1), torch.ones(2), rtol=1e-4, atol=1e-4)
    assert found.chosen.sum(1).tolist() == [2 * found.tokens] * 2


def test_probabilities_by_the_name_of_logits_are_taken_as_they_are():
    p = torch.tensor([[0.7, 0.2, 0.1]])
    places, weights = torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.2]])
    for given in (p, p.log()):
        masked, probability, used = routing("gate", (given, weights, places))
        torch.testing.assert_close(probability, p)
        torch.testing.assert_close(masked, torch.tensor([[0.7, 0.2, 0.0]]))
        assert used.tolist() == [[1, 1, 0]]


def test_models_without_experts_and_unknown_routers_are_named(llama):
    with pytest.raises(PalimpsestError, match="LlamaForCausalLM has no routed experts"):
        expert_usage(llama, people()[:2], quiet())
    with pytest.raises(PalimpsestError, match="gate gives something else than logits"):
        routing("gate", torch.zeros(3, 4))
