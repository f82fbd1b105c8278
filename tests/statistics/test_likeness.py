from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import build_model
from memorised import people, quiet
from one_by_one import EVERY, roughened, some_records
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.statistics.likeness import by_layer, classes_of, closest_classes, compared, unlabelled
from palimpsest.statistics.representations import linear_cka
from pictured import never_saw, pictures, recognising


@pytest.mark.parametrize("name", EVERY)
def test_layers_go_by_what_they_are(name):
    model, records = roughened(name), some_records(name)
    ends = ["features", "logits"] if name in ("vit", "convnet") else ["features"]
    first = next(by_layer(model, records, quiet(), batch_size=3))
    blocks = [layer for layer in first.layers if layer not in ends]
    assert list(first.layers) == [*map(str, range(1, len(blocks) + 1)), *ends]
    assert len(blocks) >= 2
    short = next(by_layer(model, records, quiet(), all_layers=False, batch_size=3))
    assert list(short.layers) == ends
    assert torch.equal(short.layers["features"], first.layers["features"])
    assert no_hooks_left(model.network)


def test_the_features_of_a_language_model_are_its_last_normalised_states():
    model, record = roughened("llama"), people()[0]
    (found,) = by_layer(model, [record], quiet())
    from palimpsest.data.encoding import Encoder

    tokens = torch.tensor([Encoder.of(model).record(record).tokens])
    states = model.network(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.layers["features"][0], states[-1][0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.layers["1"][0], states[1][0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_what_is_seen_together_is_what_each_model_shows_alone(batch_size):
    models, records = {"a": recognising(), "b": never_saw()}, pictures().train
    kept = torch.arange(len(records)) % 3 == 0
    found = compared(
        models, [("a", "b")], records, quiet(), kept=kept, keep=("features", "logits"), batch_size=batch_size
    )
    alone = {}
    for name, model in models.items():
        parts = list(by_layer(model, records, quiet()))
        index = torch.cat([part.index for part in parts])
        every = {layer: torch.cat([part.layers[layer] for part in parts]) for layer in parts[0].layers}
        alone[name] = {layer: torch.empty_like(x).index_copy_(0, index, x) for layer, x in every.items()}
        for layer in ("features", "logits"):
            torch.testing.assert_close(found.features[name, layer], alone[name][layer][kept], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.labels[name], alone[name]["logits"].argmax(-1))
    expected = linear_cka(alone["a"]["features"], alone["b"]["features"])
    assert found.products["a", "b"]["features"].cka() == pytest.approx(expected, abs=1e-5)


def test_a_model_under_two_names_is_itself_and_its_mode_stays():
    model = recognising()
    model.network.train()
    found = compared({"a": model, "b": model}, [("a", "b")], pictures().forget, quiet(), all_layers=True)
    assert all(sums.cka() == pytest.approx(1) for sums in found.products["a", "b"].values())
    assert model.network.training
    assert found.features == {}


def test_values_that_are_not_finite_name_the_model():
    broken = recognising()
    with torch.no_grad():
        next(broken.network.parameters())[:] = torch.nan
    with pytest.raises(PalimpsestError, match="the broken model gives values that are not finite"):
        compared({"whole": recognising(), "broken": broken}, [], pictures().forget, quiet())


def test_networks_of_other_layers_are_refused():
    other = build_model("llama")
    other.network.model.layers = other.network.model.layers[:1]
    other.network.config.num_hidden_layers = 1
    models = {"model": build_model("llama"), "gold": other}
    with pytest.raises(PalimpsestError, match="the gold model has other layers than the first"):
        compared(models, [], people()[:4], quiet(), all_layers=True)


def test_classes_are_labels_or_else_subjects():
    assert classes_of(pictures().forget).unique().tolist() == [3]
    assert classes_of([Record(text="a", subject="y"), Record(text="b", subject="x")]).tolist() == [1, 0]
    assert classes_of([Record(text="a", subject="y"), Record(text="b")]) is None
    assert {record.label for record in unlabelled(pictures().train)} == {0}


def test_the_closest_classes_are_those_that_downstream_data_show():
    known = pictures().train
    generator = torch.Generator().manual_seed(5)
    for wanted in (1, 3):
        noisy = [
            dataclasses.replace(
                record, image=record.image + 0.3 * torch.randn(record.image.shape, generator=generator), label=77
            )
            for record in pictures().train
            if record.label == wanted
        ]
        assert closest_classes(recognising(), known, noisy, 1, quiet()) == [wanted]
    assert sorted(closest_classes(recognising(), known, noisy, 4, quiet())) == [0, 1, 2, 3]
    with pytest.raises(PalimpsestError, match="count is 5, expected 1 to 4"):
        closest_classes(recognising(), known, noisy, 5, quiet())
    with pytest.raises(PalimpsestError, match="every record needs a label or a subject"):
        closest_classes(recognising(), known, [], 1, quiet())
