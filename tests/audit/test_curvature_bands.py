"""Which directions of a layer's input some records use more than others do."""

from __future__ import annotations

import pytest
import torch

from conftest import NEUTRAL, build_model
from memorised import data, quiet
from palimpsest.audit.curvature_bands import BANDS, CurvatureBands, band_edges, band_norms
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import capture
from palimpsest.statistics.curvature import eigenbasis, input_grams
from pictured import pictures

NAME = "model.layers.1.mlp.up_proj"


def test_bands_cover_every_direction_once():
    for width in (4, 5, 32, 576):
        edges = band_edges(width)
        assert [low for low, _ in edges] == [0, *(high for _, high in edges[:-1])]
        assert edges[-1][1] == width
        assert all(high > low for low, high in edges)
    assert band_edges(100) == [(0, 10), (10, 25), (25, 50), (50, 100)]
    with pytest.raises(PalimpsestError, match="a layer with 3 inputs"):
        band_edges(3)


def test_the_norms_are_those_of_the_projected_activations(llama):
    records = [Record(text=text) for text in NEUTRAL[:3]]
    bases = {NAME: eigenbasis(input_grams(llama, records, [NAME], quiet())[NAME].matrix)[1]}
    found = band_norms(llama, records, bases, quiet())[NAME]
    norms = []
    for record in records:
        ids = torch.tensor([llama.tokenizer(record.text)["input_ids"]])
        with capture({"norm": llama.network.get_submodule("model.layers.1.post_attention_layernorm")}) as out:
            with torch.no_grad():
                llama.network(input_ids=ids)
        norms.append(torch.stack([(out["norm"][0] @ bases[NAME])[:, a:b].norm(dim=1) for a, b in band_edges(32)]))
    torch.testing.assert_close(found, torch.cat(norms, 1).double().mean(1), rtol=1e-4, atol=1e-5)
    again = band_norms(llama, records, bases, quiet(), batch_size=1)[NAME]
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)


def test_a_role_that_is_the_reference_has_the_ratio_one(llama):
    given = data()
    reading = CurvatureBands().measure(llama, Roles(forget=given.retain, retain=given.retain), quiet())
    assert [v.name for v in reading.values] == [f"ratio/forget/{band}" for band in BANDS]
    assert all(value.value == pytest.approx(1, abs=1e-5) for value in reading.values)
    assert len(reading.arrays["ratio/forget/top 10 %"]) == 2


def test_records_in_directions_of_their_own_stand_out_in_the_low_bands(llama):
    given = data()
    reading = CurvatureBands(reference="retain").measure(
        llama, Roles(forget=[Record(text=text) for text in NEUTRAL], retain=given.retain[:2]), quiet()
    )
    assert reading["ratio/forget/bottom 50 %"].value > 1.5 * reading["ratio/forget/top 10 %"].value


def test_classifiers_are_looked_at_too_and_a_missing_reference_is_named(llama):
    pictured = pictures()
    reading = CurvatureBands().measure(
        build_model("vit"), Roles(forget=pictured.forget, retain=pictured.retain), quiet()
    )
    assert len(reading.values) == len(BANDS)
    with pytest.raises(PalimpsestError, match="compares with the role general or retain"):
        CurvatureBands().measure(llama, Roles(forget=data().forget), quiet())
