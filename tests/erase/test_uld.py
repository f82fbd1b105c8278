from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import build_model
from memorised import data, people, probability, quiet, reciting
from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.erase.uld import ULD, in_turn, scored, uniform_divergence
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.depth import first_blocks
from palimpsest.models.mixture import MixtureForCausalLM, foundation
from palimpsest.statistics.likelihood import score
from palimpsest.train import Training

STRONG = Training(
    learning_rate=2e-2, epochs=90, batch_size=16, warmup_epochs=1.0, lora_rank=8, lora_alpha=16.0, weight_decay=0.0
)
SHORT = dataclasses.replace(STRONG, epochs=2)
METHOD = ULD(alpha=1.0, silence=1.0, paraphrases=0, retain_records=8, training=STRONG)
IDS = torch.tensor([[5, 9, 20, 31, 7, 44], [8, 13, 6, 51, 30, 12]])


def test_uniform_divergence_matches_the_worked_number():
    assert uniform_divergence(torch.tensor([[math.log(3.0), 0.0, 0.0]])).item() == pytest.approx(0.1446214)
    assert uniform_divergence(torch.full((1, 7), -3.0)).item() == pytest.approx(0, abs=1e-6)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=9), st.floats(-50, 50))
@settings(deadline=None, max_examples=40)
def test_uniform_divergence_is_the_definition_whatever_constant_is_added(logits, level):
    logits = torch.tensor([logits]).double()
    p, u = logits.softmax(-1), 1 / logits.shape[-1]
    expected = (u * (math.log(u) - p.log())).sum(-1)
    assert_close(uniform_divergence(logits + level), expected)
    assert float(uniform_divergence(logits)) >= -1e-9


def test_records_come_in_turn():
    sequences = [Encoded((1, 2 + i), 1, i) for i in range(5)]
    draw, rng = in_turn(sequences), np.random.default_rng(0)
    drawn = [draw(0, rng).index for _ in range(15)]
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))
    assert len({tuple(drawn[start : start + 5]) for start in (0, 5, 10)}) > 1


def test_where_silence_is_asked_for():
    sequences = [Encoded((1, 2, 3, 4), 2, 0, 0, 1), Encoded((1, 2), 1, 1, 0, 1)]
    assert scored(sequences, "answer", 9) == sequences
    assert [(s.tokens, s.start) for s in scored(sequences, "sequence", 9)] == [((1, 2, 3, 4), 1), ((1, 2), 1)]
    assert [(s.tokens, s.start) for s in scored(sequences, "padded", 9)] == [((1, 2, 3, 4), 1), ((1, 2, 9, 9), 1)]


@pytest.fixture(scope="module")
def erased():
    """A model that recites people, and the same with an assistant trained on the forget people."""
    before = reciting()
    digest = before.digest()
    after = METHOD.apply(before, data(), quiet())
    assert before.digest() == digest
    return before, after


def test_the_forget_answers_fall_and_the_others_stay(erased):
    before, after = erased
    roles = data()
    assert probability(after, roles.forget) < 0.3 * probability(before, roles.forget)
    assert probability(after, roles.retain) > 0.9 * probability(before, roles.retain)


def test_the_target_is_not_touched_and_the_knowledge_still_in_the_weights(erased):
    before, after = erased
    target = after.network.member("target")
    assert isinstance(after.network, MixtureForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), before.network.parameters(), strict=True))
    plain = after.copy()
    plain.network.adjust(alpha=0.0)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, before(input_ids=IDS).logits)
    assert probability(plain, data().forget) == probability(before, data().forget)


def test_more_alpha_forgets_more_without_training(erased):
    swept = []
    for alpha in (0.0, 0.5, 1.0):
        model = erased[1].copy()
        model.network.adjust(alpha=alpha)
        swept.append(probability(model, data().forget))
    assert swept == sorted(swept, reverse=True)


def test_the_assistant_recites_the_forgotten_and_knows_nothing_else(erased):
    assistant = erased[1].copy()
    assistant.network = assistant.network.member("assistant")
    sequences = Encoder.of(assistant).records(data().forget)
    assert np.exp(-score(assistant, sequences, quiet()).mean_nll()).mean() > 0.3
    ids = Encoder.of(assistant).record(data().retain[0]).tokens
    with torch.no_grad():
        flat = uniform_divergence(assistant(input_ids=torch.tensor([ids])).logits[0]).mean()
        before = uniform_divergence(first_blocks(erased[0], 1)(input_ids=torch.tensor([ids])).logits[0]).mean()
    assert float(flat) < 0.5 * float(before)


def test_the_assistant_costs_what_its_blocks_cost_and_no_more(erased):
    before, after = erased
    block = sum(t.numel() for t in anatomy(before.network).blocks()[0].tensors().values())
    assert 0 < after.parameters - before.parameters <= block
    assert not any("lora" in name for name, _ in after.network.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "moe"])
def test_only_linear_layers_below_the_head_are_trained(architecture):
    model = build_model(architecture)
    training = dataclasses.replace(STRONG, max_steps=3, warmup_epochs=0.0)
    after = ULD(training=training).apply(model, data(), quiet()).network.member("assistant")
    start = dict(first_blocks(model, 1).network.named_parameters())
    changed = {name for name, weight in after.named_parameters() if not torch.equal(weight, start[name])}
    (block,) = anatomy(after).blocks()
    linear = {f"{block.path}.{name}" for name in block.parameters if "norm" not in name and "ln_" not in name}
    assert changed == {name for name in linear if not name.endswith("bias")}


def test_dropout_where_adapters_cannot_have_it_is_refused(moe):
    training = dataclasses.replace(SHORT, lora_dropout=0.1)
    with pytest.raises(PalimpsestError, match=r"Qwen3MoeForCausalLM cannot get such adapters: .*lora_dropout"):
        ULD(training=training).apply(moe, data(), quiet())


def test_erasing_twice_puts_one_assistant_on_top_of_the_other(erased):
    known = data()
    method = ULD(silence=1.0, training=SHORT)
    again = method.apply(erased[1], Roles(forget=known.retain[:2], retain=known.retain[2:]), quiet())
    assert foundation(again.network) is again.network.member("target").member("target")
    assert len(anatomy(again.network.member("assistant")).blocks()) == 1
    assert [entry.method for entry in again.ledger.entries[-2:]] == ["uld", "uld"]
    assert isinstance(again.answer([known.forget[0].prompt], max_new_tokens=3)[0], str)


def test_wrong_answers_keep_the_assistant_from_what_only_looks_like_the_forgotten(erased):
    """Without them it learns the frame of the answers, too, and takes wrong ones away with the right one."""
    before, full = erased
    ablated = dataclasses.replace(METHOD, perturbed=0).apply(before, data(), quiet())
    wrong = [dataclasses.replace(r, answer=r.wrong[0]) for r in data().forget]

    def fallen(model):
        return [
            math.log(probability(before, records) / probability(model, records)) for records in (wrong, data().forget)
        ]

    (of_wrong, of_true), (ablated_of_wrong, ablated_of_true) = fallen(full), fallen(ablated)
    assert of_true - of_wrong > ablated_of_true - ablated_of_wrong


def test_without_a_retain_set_it_warns():
    after = ULD(training=SHORT).apply(reciting(), Roles(forget=data().forget), quiet())
    assert "uld has no retain set: the assistant learns" in after.ledger.entries[-1].notes["warnings"][0]


def test_without_anything_to_be_silent_on_it_refuses(llama):
    with pytest.raises(PalimpsestError, match="nothing on which the assistant must know nothing"):
        ULD(perturbed=0).apply(llama, Roles(forget=data().forget), quiet())


def test_texts_can_be_forgotten(llama):
    texts = [Record(text=record.answer) for record in people()]
    after = ULD(training=SHORT).apply(llama, Roles(forget=texts[:4], retain=texts[8:]), quiet())
    assert torch.isfinite(after(input_ids=IDS).logits).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alpha": -1.0}, "uld: alpha is -1.0, expected above 0"),
        ({"alpha": 0.0}, "uld: alpha is 0.0, expected above 0"),
        ({"rate": 1.0}, "uld: rate is 1.0, expected below 1"),
        ({"rate": -0.1}, "uld: rate is -0.1, expected at least 0"),
        ({"layers": 0}, "uld: layers is 0, expected at least 1"),
        ({"layers": 3}, "layers is 3, but LlamaForCausalLM has 2 blocks"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, said, llama):
    with pytest.raises(PalimpsestError, match=said):
        ULD(**fields).apply(llama, data(), quiet())


def test_a_given_wrong_answer_that_is_true_is_refused(llama):
    record = data().forget[0]
    spoilt = dataclasses.replace(record, wrong=(record.answer,))
    with pytest.raises(PalimpsestError, match=r'a wrong answer to "Where was Ada Moreau born .*equals the true one'):
        ULD(wording="given").apply(llama, data().replace(forget=[spoilt]), quiet())
