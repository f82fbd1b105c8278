from __future__ import annotations

import json

import pytest
import torch

from palimpsest.errors import PalimpsestError
from palimpsest.ledger import FILE, Entry, Ledger, saved_weights_digest, verify, weights_digest

ENTRY = Entry(
    method="npo",
    settings={"beta": 0.1, "training": {"epochs": 2}},
    seed=3,
    version="0.1.0",
    data={"forget": "ab"},
    weights_before="1",
    weights_after="2",
    seconds=1.5,
    notes={"layers": [0, 1]},
    readings=[{"name": "rouge", "value": 0.5}],
)


def test_entries_come_back_in_order(tmp_path):
    ledger = Ledger(source="somewhere").add(ENTRY).add(Entry(**{**vars(ENTRY), "method": "flat"}))
    (tmp_path / FILE).write_text(json.dumps(ledger.to_dict("w")), encoding="utf-8")
    assert Ledger.read(tmp_path) == ledger
    assert [entry.method for entry in Ledger.read(tmp_path).entries] == ["npo", "flat"]


def test_adding_leaves_the_old_ledger_as_it_was():
    ledger = Ledger()
    ledger.add(ENTRY)
    assert ledger.entries == ()


def test_a_folder_without_a_ledger_has_none(tmp_path):
    assert Ledger.read(tmp_path) is None
    with pytest.raises(PalimpsestError, match=r"has no palimpsest\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weights": "x"}', '{"format": 1}', "\x00"])
def test_a_damaged_ledger_says_so(tmp_path, content):
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    with pytest.raises(PalimpsestError, match="damaged"):
        Ledger.read(tmp_path)


def test_a_ledger_of_a_later_version_asks_for_an_upgrade(tmp_path):
    (tmp_path / FILE).write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(PalimpsestError, match=r"format 99.*Upgrade"):
        Ledger.read(tmp_path)


def test_the_digest_depends_on_every_bit_name_type_and_shape():
    state = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    changed = [
        {**state, "b": torch.tensor([0.0, -0.0])},
        {**state, "a": torch.arange(6.0).reshape(2, 3)},
        {**state, "b": torch.zeros(2, dtype=torch.float64)},
        {"a": state["a"], "c": state["b"]},
    ]
    digests = {weights_digest(one) for one in [state, *changed]}
    assert len(digests) == 5
    assert weights_digest({"b": state["b"].clone(), "a": state["a"].clone()}) == weights_digest(state)


def test_the_digest_reads_views_and_bfloat16_as_they_are():
    whole = torch.arange(12.0).reshape(3, 4)
    assert weights_digest({"a": whole.T}) == weights_digest({"a": whole.T.contiguous()})
    assert weights_digest({"a": whole.bfloat16()}) != weights_digest({"a": whole})


def test_shared_tensors_count_once():
    shared = torch.ones(3)
    assert weights_digest({"a": shared, "b": shared}) == weights_digest({"a": shared})


def test_verify_finds_a_single_changed_byte(tmp_path, llama):
    folder = llama.save_pretrained(tmp_path / "model")
    assert verify(folder)["weights"] == saved_weights_digest(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(PalimpsestError, match=r"damaged or were changed.*Nothing was loaded"):
        verify(folder)


def test_a_folder_without_weights_has_no_digest(tmp_path):
    with pytest.raises(PalimpsestError, match="no safetensors"):
        saved_weights_digest(tmp_path)
