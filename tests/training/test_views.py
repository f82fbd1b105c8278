"""What an objective sees of a classifier's micro-batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import build_model, build_text_classifier
from memorised import quiet
from palimpsest.data.labelled import collate, labelled
from palimpsest.data.records import Record
from palimpsest.models.hooks import no_hooks_left
from palimpsest.train import Training, schedule, train
from pictured import pictures

ONCE = Training(learning_rate=1e-9, epochs=1, batch_size=8, max_steps=1)


def seen_by_an_objective(model, look, mode="eval", **keywords):
    """What `look(batch)` gives in the first step, and the plan."""
    plan = schedule(model, ONCE, quiet(), forget=pictures().forget, retain=pictures().retain)
    seen = []

    def objective(batch):
        seen.append(look(batch))
        return batch.forget.cross_entropy

    train(model, plan, objective, ONCE, quiet(), mode=mode, **keywords)
    return seen[0], plan


@pytest.mark.parametrize("name", ["vit", "convnet"])
def test_every_number_is_that_of_the_network_itself(name):
    def look(batch):
        view = batch.retain
        names = ("index", "targets", "logits", "log_probs", "nll", "mean_nll", "count", "cross_entropy")
        return {name: getattr(view, name).detach() for name in names}

    model = build_model(name)
    found, plan = seen_by_an_objective(model, look)
    chosen = [plan.sequences["retain"][i] for i in found["index"]]
    inputs, labels = collate(chosen, "cpu")
    with torch.no_grad():
        logits = model.network(**inputs).logits
    nll = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(found["targets"], labels)
    torch.testing.assert_close(found["logits"], logits)
    torch.testing.assert_close(found["log_probs"], -nll)
    torch.testing.assert_close(found["nll"], nll)
    torch.testing.assert_close(found["mean_nll"], nll)
    torch.testing.assert_close(found["cross_entropy"], nll.mean())
    assert found["count"].tolist() == [1.0] * len(chosen)


def test_a_watched_module_shows_its_whole_output_of_the_same_forward_pass():
    model = build_model("convnet")
    part = "resnet.pooler"
    calls = []
    model.network.resnet.register_forward_hook(lambda *_: calls.append(1))  # copied with the network
    look = lambda batch: (batch.forget.logits.detach(), batch.forget.hidden.detach(), batch.forget.index)  # noqa: E731
    (logits, hidden, index), plan = seen_by_an_objective(model, look, watch=part)
    assert len(calls) == 1
    model.network.resnet._forward_hooks.clear()
    inputs, _ = collate([plan.sequences["forget"][i] for i in index], "cpu")
    with torch.no_grad():
        expected = model.network.resnet(**inputs).pooler_output
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(model.network.classifier(hidden), logits)
    assert no_hooks_left(model.network)


def test_every_role_is_normalised_by_itself():
    model = build_model("convnet")
    look = lambda batch: {role: (getattr(batch, role).logits.detach(), getattr(batch, role).index) for role in given}  # noqa: E731
    given = ("forget", "retain")
    found, plan = seen_by_an_objective(model, look, mode="train")
    model.network.train()
    for role in given:
        logits, index = found[role]
        inputs, _ = collate([plan.sequences[role][i] for i in index], "cpu")
        with torch.no_grad():
            torch.testing.assert_close(model.network(**inputs).logits, logits)


def test_texts_are_padded_and_seen_as_if_each_stood_alone():
    model = build_text_classifier()
    texts = ("Where was Ada Moreau born ?", "It is", "The cat sat on the mat and looked at the rain .")
    records = [Record(text=text, label=i) for i, text in enumerate(texts)]
    plan = schedule(model, ONCE, quiet(), records=records)
    seen = []

    def objective(batch):
        seen.append((batch.records.nll.detach(), batch.records.index))
        return batch.records.cross_entropy

    train(model, plan, objective, ONCE, quiet())
    nll, index = seen[0]
    for value, i in zip(nll, index, strict=True):
        inputs, label = collate([labelled(model, records)[i]], "cpu")
        with torch.no_grad():
            torch.testing.assert_close(value[None], F.cross_entropy(model.network(**inputs).logits, label)[None])
