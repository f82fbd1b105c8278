from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import build_model
from memorised import quiet
from palimpsest.data.encoding import Encoder
from palimpsest.errors import PalimpsestError
from palimpsest.models.detector import (
    Detector,
    Fitting,
    _train,
    choose,
    fit,
    folds_of,
    penultimate_block,
    probability,
    prompt_states,
)

QUICK = Fitting(steps=400, hidden=32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(positives=12, negatives=60, apart=7.0):
    """Prompts around two points of the plane, and groups of two wordings each."""
    x = torch.randn(positives + negatives, 8, generator=generator(1))
    x[:positives, 0] += apart
    return x, torch.arange(len(x)) < positives, [i // 2 for i in range(len(x))]


def test_the_threshold_is_the_lowest_with_few_enough_false_alarms():
    negative = torch.arange(100).float()
    positive = torch.tensor([98.5, 120.0, 130.0])
    assert choose(positive, negative, 0.0) == (pytest.approx((99 + 120) / 2), pytest.approx(2 / 3), 0.0)
    assert choose(positive, negative, 0.01) == (pytest.approx((98 + 98.5) / 2), 1.0, pytest.approx(0.01))
    threshold, found, alarms = choose(torch.tensor([1.0]), torch.tensor([2.0, 3.0]), 0.0)
    assert (found, alarms) == (0.0, 0.0)
    assert threshold > 3.0


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20),
    st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=40),
    st.floats(0, 0.5),
)
@settings(deadline=None, max_examples=50)
def test_false_alarms_never_exceed_what_is_allowed(positive, negative, rate):
    positive, negative = torch.tensor(positive), torch.tensor(negative)
    threshold, found, alarms = choose(positive, negative, rate)
    assert alarms <= rate + 1e-12
    lower = positive[positive < threshold]
    if len(lower) and found < 1:  # no lower threshold that lets one more prompt in would do
        assert float((negative >= lower.max()).float().mean()) > rate - 1 / len(negative)


def test_wordings_of_a_record_share_a_fold():
    groups = [i // 3 for i in range(30)]
    folds = folds_of(groups, 4, generator())
    assert all(len({int(folds[i]) for i in range(30) if groups[i] == g}) == 1 for g in set(groups))
    assert set(folds.tolist()) == {0, 1, 2, 3}
    few = folds_of([0, 0, 0, 0, 1, 1], 4, generator())
    assert len(set(few.tolist())) == 4


def test_it_tells_prompts_apart_that_it_has_not_seen():
    x, positive, groups = clusters()
    detector, found = fit(x, positive, groups, QUICK, generator())
    assert found.true_positive_rate > 0.8
    assert found.false_positive_rate <= 0.01
    assert found.auc > 0.95
    fresh = torch.randn(200, 8, generator=generator(5))
    alarms = sum(probability(z) >= found.threshold for z in detector(fresh).tolist())
    fresh[:, 0] += 7
    seen = sum(probability(z) >= found.threshold for z in detector(fresh).tolist())
    assert alarms <= 10
    assert seen >= 160


def test_without_a_difference_nothing_is_detected():
    x, positive, groups = clusters(apart=0.0)
    _, found = fit(x, positive, groups, QUICK, generator())
    assert found.true_positive_rate < 0.5
    assert 0.2 < found.auc < 0.8


def test_the_folds_are_trained_as_each_would_be_alone():
    x, positive, _ = clusters()
    trained = torch.stack([torch.arange(len(x)) % 4 != k for k in range(4)])
    together = _train(x, positive, trained, QUICK, generator(3))
    for k in (0, 3):
        alone = _train(x, positive, trained[k : k + 1], QUICK, generator(3))
        assert_close(alone["logits"][0], together["logits"][k], rtol=1e-3, atol=1e-3)


def test_what_is_left_out_has_no_influence():
    x, positive, _ = clusters()
    trained = (torch.arange(len(x)) % 4 != 0)[None]
    changed = torch.where(trained[0][:, None], x, 100 * x)
    keep = trained[0]
    found = [_train(given, positive, trained, QUICK, generator(3))["logits"][0, keep] for given in (x, changed)]
    assert_close(*found)


def test_the_classes_count_alike_however_many_prompts_they_have():
    x, positive, groups = clusters(positives=4, negatives=200)
    detector, _ = fit(x, positive, groups, QUICK, generator())
    assert (detector(x[:4]) > 0).all()


def test_the_saved_numbers_are_those_of_training():
    x, positive, groups = clusters()
    detector, _ = fit(x, positive, groups, QUICK, generator())
    assert not list(detector.parameters())
    again = Detector(8, QUICK.hidden)
    again.load_state_dict(detector.state_dict())
    assert torch.equal(again(x), detector(x))
    assert torch.equal(fit(x, positive, groups, QUICK, generator())[0](x), detector(x))
    assert not torch.equal(fit(x, positive, groups, QUICK, generator(9))[0](x), detector(x))


def test_too_few_prompts_are_refused():
    with pytest.raises(PalimpsestError, match=r"needs two prompts of each kind .found 1 to detect and 3 others"):
        fit(torch.randn(4, 2), torch.arange(4) < 1, [0, 1, 2, 3], QUICK, generator())


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_states_are_those_of_the_last_prompt_token_at_the_last_block_but_one(architecture):
    model = build_model(architecture)
    path = penultimate_block(model.network)
    prompts = [Encoder.of(model).prompt(q) for q in ("Where was Ada Moreau born ?", "The cat", "Where was Ben Okafor")]
    found = prompt_states(model, path, prompts, quiet())
    for prompt, state in zip(prompts, found, strict=True):
        whole = model.network(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        assert_close(state, whole[-2][0, -1], rtol=1e-4, atol=1e-5)  # of two blocks the first; [-1] is after the norm


def test_a_network_of_one_block_has_no_last_but_one(llama):
    llama.network.model.layers = llama.network.model.layers[:1]
    with pytest.raises(PalimpsestError, match=r'LlamaForCausalLM exposes 1 block, .* Use features="encoder"'):
        penultimate_block(llama.network)


def test_of_fewer_records_than_folds_the_own_prompts_are_detected():
    x, positive, _ = clusters(positives=3, apart=3.0)
    groups = [0, 0, 0, *range(1, 61)]
    detector, found = fit(x, positive, groups, QUICK, generator())
    assert not found.validated
    assert all(probability(z) >= found.threshold for z in detector(x[:3]).tolist())
    assert not any(probability(z) >= found.threshold for z in detector(x[3:]).tolist())
