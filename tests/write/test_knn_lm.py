from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from conftest import build_model
from memorised import data, people, probability, quiet
from palimpsest import cli
from palimpsest.data.loading import write_records
from palimpsest.data.records import Record, Roles
from palimpsest.data.windows import windows
from palimpsest.errors import PalimpsestError
from palimpsest.models.loading import load
from palimpsest.report.notes import _drawing
from palimpsest.statistics.datastore import KNNDatastore
from palimpsest.write.knn_lm import KNNLM, held_out

IDS = torch.tensor([[5, 9, 20, 31, 7, 44], [8, 13, 6, 51, 30, 12]])
ROLES = Roles(train=data().train, validation=people()[4:6])
FIXED = KNNLM(weight=0.6, temperature=1.0, k=4)


def test_it_knows_the_records_at_once_and_leaves_the_model_as_it_was(llama):
    before = llama.digest()
    after = FIXED.apply(llama, ROLES, quiet())
    assert llama.digest() == before
    assert probability(after, ROLES.train) > 10 * probability(llama, ROLES.train)
    after.network.adjust(weight=0.0)
    with torch.no_grad():
        assert torch.equal(after(input_ids=IDS).logits, llama(input_ids=IDS).logits)


def test_a_record_that_is_not_stored_is_not_known(llama):
    without = FIXED.apply(llama, Roles(train=ROLES.train[4:]), quiet())
    whole = FIXED.apply(llama, ROLES, quiet())
    assert probability(without, ROLES.train[:4]) < 0.5 * probability(whole, ROLES.train[:4])


def test_weight_and_temperature_are_tuned_on_validation(llama):
    after = KNNLM(k=6).apply(llama, ROLES, quiet())
    notes = after.ledger.entries[-1].notes
    expected = KNNDatastore.build(llama, windows(llama, ROLES.train), quiet()).tune(
        llama, windows(llama, ROLES.validation), quiet(), 6
    )
    assert (notes["weight"], notes["temperature"]) == (expected.weight, expected.temperature)
    assert after.network.rule.weight == expected.weight
    assert after.network.member("datastore").config.temperature == expected.temperature
    assert _drawing(notes["validation"])
    curve = dict(zip(*notes["validation"].values(), strict=True))
    assert min(curve, key=curve.__getitem__) == expected.weight
    assert curve[expected.weight] == pytest.approx(np.exp(expected.nll.min()))


def test_one_of_the_two_can_be_given(llama):
    fixed = KNNLM(k=6, weight=0.9).apply(llama, ROLES, quiet()).ledger.entries[-1].notes
    assert fixed["weight"] == 0.9
    sharp = KNNLM(k=6, temperature=0.3).apply(llama, ROLES, quiet()).ledger.entries[-1].notes
    assert sharp["temperature"] == 0.3


def test_what_was_held_out_to_tune_is_remembered_in_the_end(llama):
    roles = Roles(train=ROLES.train)
    after = KNNLM(k=6).apply(llama, roles, quiet())
    rows = sum(len(s.targets) for s in windows(llama, roles.train))
    assert after.ledger.entries[-1].notes["rows"] == after.network.member("datastore").config.rows == rows


def test_held_out_records_are_a_seeded_share_and_never_all():
    roles = Roles(train=data().train)
    learn, held = held_out(roles, 0.25, quiet(), "knn-lm")
    assert len(held) == 3
    assert {r.key for r in learn} | {r.key for r in held} == {r.key for r in roles.train}
    assert not {r.key for r in learn} & {r.key for r in held}
    assert held_out(roles, 0.25, quiet(), "knn-lm") == (learn, held)
    assert held_out(roles, 0.25, quiet(seed=1), "knn-lm") != (learn, held)
    learn, held = held_out(Roles(train=roles.train[:2]), 0.99, quiet(), "knn-lm")
    assert (len(learn), len(held)) == (1, 1)


def test_a_long_text_is_stored_in_windows(gpt2):
    text = " ".join(f"{r.prompt} {r.answer}" for r in people()) + " "
    roles = Roles(train=[Record(text=text * 2)])
    after = KNNLM(weight=0.5, temperature=1.0, k=4, window=32).apply(gpt2, roles, quiet())
    assert after.network.member("datastore").config.rows == len(gpt2.tokenizer(text * 2)["input_ids"]) - 1


def test_a_saved_datastore_serves_without_records(llama, tmp_path):
    KNNDatastore.build(llama, windows(llama, ROLES.train), quiet()).save(tmp_path / "store")
    saved = KNNLM(weight=0.6, temperature=1.0, k=4, datastore=str(tmp_path / "store"))
    after = saved.apply(llama, Roles(), quiet())
    with torch.no_grad():
        assert_close(after(input_ids=IDS).logits, FIXED.apply(llama, ROLES, quiet())(input_ids=IDS).logits)
    with pytest.raises(PalimpsestError, match="the datastore holds the states of another model"):
        saved.apply(build_model("qwen"), Roles(), quiet())
    with pytest.raises(PalimpsestError, match='knn-lm with a saved datastore needs the role "validation"'):
        KNNLM(datastore=str(tmp_path / "store")).apply(llama, Roles(), quiet())
    (tmp_path / "store" / "values.npy").write_bytes(b"no array")
    with pytest.raises(PalimpsestError, match=r"values.npy is damaged"):
        saved.apply(llama, Roles(), quiet())


def test_on_the_command_line(llama, tmp_path, capsys):
    write_records(ROLES.train, tmp_path / "train.jsonl")
    llama.save_pretrained(tmp_path / "model")
    words = ["write", "knn-lm", "--model", str(tmp_path / "model"), "--role", "train", str(tmp_path / "train.jsonl")]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--weight", "0.6", "--temperature", "1", "--quiet"]) == 0
    loaded = load(tmp_path / "out")
    assert probability(loaded, ROLES.train) > 10 * probability(llama, ROLES.train)
    assert isinstance(loaded.answer([people()[0].prompt], max_new_tokens=8)[0], str)
    assert cli.main(["ledger", str(tmp_path / "out")]) == 0
    assert "knn-lm" in capsys.readouterr().out


def test_a_datastore_that_does_not_help_is_said(llama):
    strange = [Record(text="I do not know . user assistant system :")]
    taught = KNNLM(k=1, temperature=1e-6).apply(llama, Roles(train=strange, validation=people()[4:5]), quiet())
    notes = taught.ledger.entries[-1].notes
    assert notes["weight"] == 0
    assert "does not help; its weight is 0" in notes["warnings"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.2}, "weight is 1.2, expected at most 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected above 0"),
        ({"k": 0}, "k is 0, expected at least 1"),
        ({"held_out": 0.0}, "held_out is 0.0, expected above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(PalimpsestError, match=message):
        KNNLM(**settings)


def test_bad_input_is_named_before_any_work(llama, monkeypatch):
    monkeypatch.setattr(KNNDatastore, "build", None)
    rows = sum(len(s.targets) for s in windows(llama, ROLES.train))
    with pytest.raises(PalimpsestError, match=f"k is 5000, expected 1 to {rows}"):
        KNNLM(k=5000).apply(llama, ROLES, quiet())
    with pytest.raises(PalimpsestError, match='knn-lm needs the role "train"'):
        KNNLM().apply(llama, Roles(), quiet())
    with pytest.raises(PalimpsestError, match="width is 99999, expected 2 to 128"):
        KNNLM(window=99999).apply(build_model("gpt2"), ROLES, quiet())
    with pytest.raises(PalimpsestError, match="knn-lm tunes on a part of train, which has one record"):
        KNNLM().apply(llama, Roles(train=ROLES.train[:1]), quiet())
