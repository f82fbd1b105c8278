"""The parts of the SEUF reproduction: topics without shared words, even use of experts, ascent up to a target."""

from __future__ import annotations

import dataclasses

import torch

from memorised import quiet
from palimpsest.data.records import Roles
from palimpsest.reproduce.seuf import ASCENT, LEARNING, TARGET, Balanced, Measures, Until, accuracy, facts, new_model
from palimpsest.statistics.experts import expert_usage
from palimpsest.write.finetune import Finetune

SHORT = dataclasses.replace(LEARNING, epochs=12)


def words(records):
    return {word for r in records for word in f"{r.prompt} {r.answer}".split()}


def test_topics_share_no_word_and_every_word_is_a_token():
    data = facts(3)
    assert (len(data.forget), len(data.retain)) == (36, 180)
    assert not words(data.forget) & words(data.retain)
    known = new_model().tokenizer.get_vocab()
    assert words(data.train) <= set(known)
    assert facts(3).digest() == data.digest() != facts(4).digest()


def test_the_balancing_loss_evens_out_the_use_of_experts():
    data, model = facts(), new_model()
    with torch.no_grad():
        model.network.get_parameter("model.layers.0.mlp.gate.weight")[0] += 0.5
    shares = {}
    for name, method in (("balanced", Balanced(training=SHORT)), ("plain", Finetune(training=SHORT))):
        used = expert_usage(method.apply(model, Roles(train=data.train), quiet()), data.train, quiet()).chosen[0]
        shares[name] = float(used.max() / used.sum())
    assert shares["balanced"] < shares["plain"]


def test_ascent_ends_when_the_topic_is_gone():
    data = facts()
    knows = Finetune(training=dataclasses.replace(LEARNING, epochs=150)).apply(
        new_model(), Roles(train=data.forget), quiet()
    )
    assert accuracy(knows, data.forget, quiet()) > 0.9
    result = Until(where="all", learning_rate=3e-3).apply(knows, data, quiet())
    assert accuracy(result, data.forget, quiet()) <= TARGET
    reading = Measures().measure(result, data, quiet())
    assert reading["forget"].value == accuracy(result, data.forget, quiet())
    assert 0 <= reading["overlap"].value <= 1
    assert ASCENT.epochs > 100
