"""Calls that a user gets nearly right: what is meant is understood, or one sentence says what was expected."""

from __future__ import annotations

import dataclasses
import re

import pandas
import pytest
import torch

import palimpsest as pal
from conftest import build_model
from memorised import data, quiet, reciting
from palimpsest.audit import audit
from palimpsest.errors import PalimpsestError
from palimpsest.models import loading
from palimpsest.models.datastore import DatastoreForCausalLM
from palimpsest.write.knn_lm import KNNLM

KNOWN = data()
ONCE = pal.Training(epochs=1, max_steps=1, learning_rate=1e-3, warmup_epochs=0.0)
ROWS = [{"question": r.prompt, "answer": r.answer, "name": r.subject} for r in KNOWN.forget]


def ascent():
    return pal.create("gradient-ascent", training=ONCE)


def looking_up():
    """A model beside a datastore that holds everything."""
    fixed = KNNLM(weight=0.6, temperature=1.0, k=4)
    return fixed.apply(build_model("llama"), pal.Roles(train=KNOWN.train, validation=KNOWN.retain), quiet())


def test_records_may_be_rows_of_whatever_holds_rows():
    frame = pandas.DataFrame([*ROWS, {"question": "Who ?", "answer": "Nobody .", "name": None}])
    frame.loc[0, "name"] = float("nan")
    found = pal.Roles(forget=frame).forget
    assert [r.prompt for r in found[:-1]] == [r.prompt for r in KNOWN.forget]
    assert found[0].subject is found[-1].subject is None
    assert found[1].subject == KNOWN.forget[1].subject
    assert pal.load_records(ROWS) == list(pal.Roles(forget=ROWS).forget)
    assert pal.by_subject(ROWS, "Ada Moreau")[0] == pal.Roles(forget=ROWS[:2]).forget


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "answer": 5}, 'field "answer" must be text, not a number: 5'),
        ({"prompt": "a", "answer": ""}, 'field "answer" is empty'),
        ({"prompt": "a", "answer": "b", "wrong": "c"}, 'field "wrong" must be a list of texts, not text'),
        ({"messages": []}, 'field "messages" must be a list of'),
        ({"messages": [{"from": "human", "value": "a"}]}, 'field "messages" must be a list of'),
        ({"ask": "a", "reply": "b"}, r'field "text" is missing \(found: ask, reply\)\. Rename it\.'),
    ],
)
def test_a_dictionary_is_checked_like_a_line_of_a_file(row, expected):
    with pytest.raises(PalimpsestError, match=f"role forget, record 2: .*{expected}"):
        pal.Roles(forget=[ROWS[0], row])


def test_one_wrong_answer_is_not_a_list_of_letters():
    with pytest.raises(PalimpsestError, match='"wrong" must be a list of texts'):
        pal.Record(prompt="a", answer="b", wrong="one text")


def test_roles_may_be_a_mapping_and_a_model_must_be_one():
    expected = ascent().apply(reciting(), KNOWN, quiet())
    assert ascent().apply(reciting(), dict(KNOWN), quiet()).digest() == expected.digest()
    with pytest.raises(
        PalimpsestError, match=r"gradient-ascent: expected Roles\(forget=\.\.\., retain=\.\.\.\), found"
    ):
        ascent().apply(reciting(), KNOWN.forget, quiet())
    for wrong in ("my-model", reciting().network):
        with pytest.raises(PalimpsestError, match="gradient-ascent: expected a palimpsest Model, found"):
            ascent().apply(wrong, KNOWN, quiet())


def test_probes_may_be_names():
    by_name = audit(reciting(), dict(KNOWN), ["answer-probability"], quiet())
    by_probe = audit(reciting(), KNOWN, pal.probes("answer-probability"), quiet())
    assert [reading.values for reading in by_name.readings] == [reading.values for reading in by_probe.readings]
    assert by_name["probability/forget"].value > 0.5
    with pytest.raises(KeyError, match=r"there is no value .*probability/forgt.*Did you mean"):
        by_name["probability/forgt"]
    with pytest.raises(PalimpsestError, match="audit: expected a palimpsest Model"):
        audit("my-model", KNOWN, ["answer-probability"], quiet())


def test_a_value_that_could_not_be_measured_says_why():
    found = audit(reciting(), pal.Roles(forget=KNOWN.forget), ["membership"], quiet())
    with pytest.raises(KeyError, match=r"membership was not measured: membership needs the role .*holdout"):
        found["auc/loss"]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: pal.load(None), "expected the name or folder of a model, found a NoneType"),
        (lambda: pal.load(reciting()), "expected the name or folder of a model, found a Model"),
        (lambda: pal.Run(seed="0"), "seed is '0', expected a whole number"),
        (lambda: pal.load_records("x.jsonl", fields="ask"), "fields is 'ask', expected a mapping"),
        (lambda: pal.load_records(3), "expected a list of records, found one int"),
        (
            lambda: pal.by_subject(KNOWN.train, "Ada"),
            'the subject .Ada.\\. Did you mean "Ada Moreau"',
        ),
        (lambda: pal.forget(reciting(), None), "expected a list of records, found one NoneType"),
        (lambda: pal.audit_saved([], KNOWN, "out"), "an audit needs a model"),
    ],
)
def test_one_sentence_says_what_was_expected(call, expected):
    with pytest.raises(PalimpsestError, match=expected):
        call()


def test_anatomy_takes_a_model():
    assert len(pal.anatomy(reciting()).blocks()) == 2


def test_to_forget_roles_is_to_forget_one_and_keep_the_other():
    how = {"enough": 0.85, "progress": False, "show": False}
    roles = pal.Roles(forget=KNOWN.forget, retain=KNOWN.retain)
    by_roles = pal.forget(reciting(), roles, **how)
    apart = pal.forget(reciting(), [dict(row) for row in ROWS], retain=KNOWN.retain, **how)
    assert by_roles.digest() == apart.digest()
    assert by_roles.story.questions == tuple(record.prompt for record in KNOWN.forget)


def test_what_was_measured_is_written_where_folders_are_paths(tmp_path):
    folder = reciting().save_pretrained(tmp_path / "model")
    page = pal.audit_saved(folder, KNOWN, tmp_path / "out", quiet(), battery=["answer-probability"], max_new_tokens=2)
    assert page.exists()
    with pytest.raises(PalimpsestError, match="nowhere"):
        pal.audit_saved([folder, "nowhere"], KNOWN, tmp_path / "other", quiet(), battery=["answer-probability"])
    assert not (tmp_path / "other").exists()


def test_float16_is_refused_and_bfloat16_is_said():
    half = reciting()
    half.network.half()
    with pytest.raises(PalimpsestError, match="the weights are in float16, in which training breaks a model"):
        ascent().apply(half, KNOWN, quiet())
    brief = reciting()
    brief.network.bfloat16()
    warnings = ascent().apply(brief, KNOWN, quiet(precision="bfloat16")).ledger.entries[-1].notes["warnings"]
    assert any("is lost in rounding" in text for text in warnings)


def test_no_eraser_claims_to_have_reached_a_datastore():
    """The texts lie in it in clear; the probabilities would say that they are gone."""
    with pytest.raises(PalimpsestError, match="looks up a datastore, which holds its texts in clear"):
        ascent().apply(looking_up(), KNOWN, quiet())
    with pytest.raises(PalimpsestError, match="looks up a datastore"):
        pal.forget(looking_up(), KNOWN.forget, retain=KNOWN.retain, progress=False, show=False)


def test_training_on_beside_a_datastore_says_that_its_keys_are_old():
    after = pal.create("finetune", training=ONCE).apply(looking_up(), pal.Roles(train=KNOWN.train), quiet())
    assert any("keys are states of the weights before" in text for text in after.ledger.entries[-1].notes["warnings"])
    plain = pal.create("finetune", training=ONCE).apply(reciting(), pal.Roles(train=KNOWN.train), quiet())
    assert "warnings" not in plain.ledger.entries[-1].notes


def test_a_model_with_a_datastore_can_be_saved_by_torch(tmp_path):
    model, ids = looking_up(), torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    torch.save(model.network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)
    assert isinstance(again.member("datastore"), DatastoreForCausalLM)
    torch.testing.assert_close(again(ids).logits, expected)


@pytest.mark.parametrize("slug", ["knn-lm", "whp-decode", "guard"])
def test_networks_of_ours_give_tuples_where_asked(slug):
    if slug == "knn-lm":
        network = looking_up().network
    else:
        fields = {"alpha": 30.0, "reinforce": ONCE} if slug == "whp-decode" else {}
        network = pal.create(slug, **fields).apply(reciting(), KNOWN, quiet()).network
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, expected = network(input_ids=ids, return_dict=False), network(input_ids=ids)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[0], expected.logits)


def test_a_start_that_holds_other_weights_now_is_no_start(tmp_path):
    base = build_model("llama").save_pretrained(tmp_path / "base")
    start = pal.load(base)
    start.ledger = dataclasses.replace(start.ledger, source=str(base))
    learned = pal.create("finetune", training=ONCE).apply(start, pal.Roles(train=KNOWN.train), quiet())
    build_model("llama").save_pretrained(tmp_path / "base", overwrite=True)
    pal.create("retrain").apply(learned, KNOWN, quiet())
    reciting().save_pretrained(tmp_path / "base", overwrite=True)
    with pytest.raises(PalimpsestError, match=re.escape("from which this model started by its ledger, holds other")):
        pal.create("retrain").apply(learned, KNOWN, quiet())


@pytest.mark.parametrize("learned_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked_in", ["float32", "bfloat16"])
def test_a_start_is_known_in_either_precision(learned_in, asked_in, tmp_path):
    base = build_model("llama").save_pretrained(tmp_path / "base")
    start = pal.load(base, run=quiet(precision=learned_in))
    start.ledger = dataclasses.replace(start.ledger, source=str(base))
    learned = pal.create("finetune", training=ONCE).apply(start, pal.Roles(train=KNOWN.train), quiet())
    for slug in ("retrain", "lines"):
        pal.create(slug).apply(learned, KNOWN, quiet(precision=asked_in))


def test_a_role_that_is_given_and_not_read_is_said(tmp_path, capsys):
    from palimpsest import cli

    folder = reciting().save_pretrained(tmp_path / "model")
    for role in ("forget", "train"):
        pal.write_records(KNOWN[role], tmp_path / f"{role}.jsonl")
    words = ["erase", "gradient-ascent", "--model", folder, "--out", tmp_path / "after", "--data"]
    words += [tmp_path / "train.jsonl", "--role", "forget", tmp_path / "forget.jsonl", "--training.max-steps", "1"]
    assert cli.main([str(word) for word in [*words, "--quiet"]]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "gradient-ascent does not read the role train, which --data gives; it reads forget, retain." in said


def test_retraining_begins_with_the_embedded_model_where_the_ledger_says_so(monkeypatch):
    """Its name there is that of the file it was converted from."""
    start = build_model("llama")
    start.ledger = dataclasses.replace(start.ledger, source=f"{loading.EMBEDDED[1]} (SHA-256 0123)")
    learned = pal.create("finetune", training=ONCE).apply(start, pal.Roles(train=KNOWN.train), quiet())
    loaded = []
    monkeypatch.setattr(loading, "load", lambda name, run=None: loaded.append(name) or build_model("llama"))
    pal.create("retrain").apply(learned, KNOWN, quiet())
    assert loaded == [loading.DEFAULT]


def test_a_start_that_is_not_there_is_named_with_its_ledger():
    start = build_model("llama")
    start.ledger = dataclasses.replace(start.ledger, source="/gone/base")
    learned = pal.create("finetune", training=ONCE).apply(start, pal.Roles(train=KNOWN.train), quiet())
    expected = "retrain: the start that the ledger names, /gone/base, cannot be loaded: .* Name it as base."
    with pytest.raises(PalimpsestError, match=expected):
        pal.create("retrain").apply(learned, KNOWN, quiet())
