from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import data, people, quiet, reciting
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.statistics.tracing import PLACES, SUBJECT, Trace, default_window, fact_of, find_spans, trace

KINDS = ("residual", "mlp", "attention")


def facts():
    return list(data().forget)


def own_facts(model):
    """Facts whose answer token is whatever the model predicts, so that an untrained model can be traced."""
    for fact in (fact_of(model, record) for record in people()[:8:2]):
        logits = model.network(input_ids=torch.tensor([fact.tokens])).logits
        yield dataclasses.replace(fact, answer=int(logits[0, -1].argmax()))


def test_a_fact_ends_before_the_first_word_that_is_not_in_its_question():
    model = reciting()
    fact = fact_of(model, facts()[0])
    read = model.tokenizer.convert_ids_to_tokens
    assert read([fact.answer]) == ["Lyon"]
    assert read(list(fact.tokens))[-2:] == ["born", "in"]
    assert [read([fact.tokens[i] for i in range(*span)]) for span in fact.spans] == [["Ada", "Moreau"]] * 2


def test_places_are_relative_to_the_last_subject():
    fact = fact_of(reciting(), facts()[0])
    named = [PLACES[i] for i in fact.places()]
    start, end = fact.spans[-1]
    assert named[start] == "first subject token"
    assert named[end - 1] == "last subject token"
    assert named[-1] == "last token"
    assert set(named[:start]) == {"before"}
    assert set(named[end:-1]) == {"between"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_nothing_is_corrupted_and_nothing_comes_back(kind):
    found = trace(reciting(), facts(), quiet(), kind=kind, noise=0.0, samples=3)
    torch.testing.assert_close(found.p_corrupted, found.p_clean, rtol=0, atol=1e-5)
    assert float(found.effects.nan_to_num().abs().max()) < 1e-5
    assert found.total_effect == pytest.approx(0, abs=1e-5)


def test_noise_on_the_subject_takes_the_answer_away():
    found = trace(reciting(), facts(), quiet())
    assert found.skipped == 0
    assert found.total_effect > 0.3


def test_the_last_state_of_the_last_layer_decides_alone(causal_lm):
    """Putting it back gives the clean probability exactly: nothing else reaches the prediction."""
    found = trace(causal_lm, list(own_facts(causal_lm)), quiet(), kind="residual", samples=4)
    back = found.effects[PLACES.index("last token"), -1] + found.p_corrupted.mean()
    assert float(back) == pytest.approx(float(found.p_clean.mean()), abs=1e-6)
    assert no_hooks_left(causal_lm.network)


def test_putting_back_every_layer_at_once_is_the_widest_window():
    """With a window over all layers it does not matter which layer is in its middle."""
    found = trace(reciting(), facts(), quiet(), window=99)
    row = found.effects[PLACES.index("last subject token")]
    torch.testing.assert_close(row, row[:1].expand_as(row), rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_effects_and_chunks_do_not_matter(monkeypatch):
    once = trace(reciting(), facts()[:2], quiet(), samples=3)
    monkeypatch.setattr("palimpsest.statistics.tracing.ROW_TOKENS", 1)
    again = trace(reciting(), facts()[:2], quiet(), samples=3)
    torch.testing.assert_close(again.effects, once.effects, rtol=0, atol=1e-6, equal_nan=True)


def test_what_stands_before_a_token_is_computed_once_and_changes_nothing(causal_lm, monkeypatch):
    facts = list(own_facts(causal_lm))
    once = trace(causal_lm, facts, quiet(), samples=3)
    monkeypatch.setattr("palimpsest.statistics.tracing.keeps_cache", lambda network: False)
    whole = trace(causal_lm, facts, quiet(), samples=3)
    torch.testing.assert_close(once.effects, whole.effects, rtol=0, atol=1e-6, equal_nan=True)


def test_tracing_the_subject_alone_leaves_its_effects_and_the_layers_as_they_were():
    whole = trace(reciting(), facts(), quiet(), samples=3)
    subject = trace(reciting(), facts(), quiet(), samples=3, places=SUBJECT)
    rows = [PLACES.index(place) for place in SUBJECT]
    torch.testing.assert_close(subject.effects[rows], whole.effects[rows], rtol=0, atol=1e-6, equal_nan=True)
    assert subject.layers() == whole.layers()
    assert torch.isnan(subject.effects[[0, 4, 5]]).all()


def test_nothing_can_come_back_before_the_first_subject_token():
    fact = fact_of(reciting(), facts()[0])
    cut = dataclasses.replace(fact, spans=fact.spans[1:])
    found = trace(reciting(), [cut], quiet(), samples=2)
    assert float(found.effects[PLACES.index("before")].abs().max()) == 0.0


def test_the_layers_are_the_best_third_at_the_subject():
    effects = torch.zeros(len(PLACES), 9)
    effects[3, 4:7] = torch.tensor([0.2, 0.3, 0.2])
    effects[5, 8] = 9.0
    found = Trace(kind="mlp", effects=effects, p_clean=torch.ones(1), p_corrupted=torch.zeros(1), skipped=0)
    assert found.layers() == (4, 5, 6)
    assert found.layers(1) == (5,)


def test_windows():
    assert [default_window(layers) for layers in (2, 4, 12, 16, 32)] == [1, 1, 4, 10, 10]


def test_spans_are_found_with_and_without_a_space(chat_tokenizer):
    ids = chat_tokenizer("Ada Moreau and Ada Moreau")["input_ids"]
    assert find_spans(chat_tokenizer, "Ada Moreau", ids) == ((0, 2), (3, 5))


def test_facts_the_model_does_not_know_are_skipped_and_counted():
    found = trace(reciting(), [*facts(), *people()[4:8]], quiet(), samples=2)
    assert found.skipped >= 3
    with pytest.raises(PalimpsestError, match="none of 4 facts can be traced"):
        trace(build_model("llama"), facts(), quiet())


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (Record(text="The cat sat on the mat ."), "it has no prompt with an answer"),
        (Record(prompt="Who ?", answer="The cat ."), "it has no subject"),
        (Record(prompt="Who ?", answer="The cat .", subject="Ada Moreau"), "its subject 'Ada Moreau' is not in it"),
    ],
)
def test_what_cannot_be_traced(record, told):
    with pytest.raises(PalimpsestError, match=told):
        trace(reciting(), [record], quiet())
