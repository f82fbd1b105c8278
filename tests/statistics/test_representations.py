from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NEUTRAL, build_text_classifier
from memorised import people, quiet
from one_by_one import EVERY, roughened, some_records
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import capture, no_hooks_left
from palimpsest.statistics.representations import (
    CrossProducts,
    batch_mean_cka,
    compare_representations,
    linear_cka,
    representations,
)


def gram_cka(x, y):
    """The definition on centred Gram matrices."""
    centring = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, h = (centring @ (m @ m.T) @ centring for m in (x.double(), y.double()))
    return float((k * h).sum() / (k.norm() * h.norm()))


def gram_unbiased(x, y):
    """Song et al. 2012, eq. 5, on Gram matrices without their diagonal."""
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)

    def hsic(a, b):
        k, h = (m.double() @ m.double().T for m in (a, b))
        k, h = (m - torch.diag(m.diagonal()) for m in (k, h))
        whole = (one @ k @ one) * (one @ h @ one) / ((n - 1) * (n - 2))
        return ((k @ h).trace() + whole - 2 / (n - 2) * (one @ k @ h @ one)) / (n * (n - 3))

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(5, 30), d=st.integers(2, 12), e=st.integers(2, 12), shift=st.sampled_from([0.0, 3.0, 1000.0]))
def test_running_sums_give_the_direct_formulas(n, d, e, shift):
    x, y = draw(n, n, d) + shift, draw(d, n, e) - shift
    y[:, 0] += x[:, 0]
    sums = CrossProducts()
    for start in range(0, n, 4):
        sums.add(x[start : start + 4], y[start : start + 4])
    x, y = x - x.mean(0), y - y.mean(0)  # the direct formulas lose digits far from the mean; the sums must not
    assert sums.cka() == pytest.approx(gram_cka(x, y), abs=1e-10)
    assert sums.unbiased_cka() == pytest.approx(gram_unbiased(x, y), rel=1e-6, abs=1e-8)


def test_cka_of_one_number_is_the_squared_correlation():
    assert linear_cka(torch.tensor([[1.0], [2], [3]]), torch.tensor([[1.0], [3], [2]])) == pytest.approx(0.25)


def test_cka_of_a_square_and_its_shadow():
    x = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert linear_cka(x, x * torch.tensor([1.0, 0])) == pytest.approx(0.70711, abs=1e-5)


def test_cka_does_not_see_rotations_scalings_and_shifts():
    x, y = draw(1, 40, 6), draw(2, 40, 5)
    rotation = torch.linalg.qr(draw(3, 6, 6))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    for unbiased in (False, True):
        value = linear_cka(x, y, unbiased=unbiased)
        assert linear_cka(3 * x @ rotation + 5, y, unbiased=unbiased) == pytest.approx(value, abs=1e-10)
        assert linear_cka(y, x, unbiased=unbiased) == pytest.approx(value, abs=1e-10)
    assert linear_cka(x @ torch.diag(torch.arange(1.0, 7)).double(), y) != pytest.approx(linear_cka(x, y), abs=1e-3)


def test_the_unbiased_value_of_independent_features_is_near_0_where_the_other_is_not():
    x, y = draw(1, 512, 512), draw(2, 512, 512)
    assert linear_cka(x, y) > 0.4
    assert abs(linear_cka(x, y, unbiased=True)) < 0.02


def test_collapsed_representations_have_no_cka():
    x = torch.full((9, 4), 0.1, dtype=torch.float32) * 3
    assert math.isnan(linear_cka(x, draw(1, 9, 3)))
    assert math.isnan(linear_cka(draw(1, 9, 3), x, unbiased=True))


def test_few_records_and_unequal_ones_are_refused():
    with pytest.raises(PalimpsestError, match="CKA needs at least 3 records, found 2"):
        linear_cka(draw(1, 2, 3), draw(2, 2, 3))
    with pytest.raises(PalimpsestError, match="CKA needs at least 4 records, found 3"):
        linear_cka(draw(1, 3, 3), draw(2, 3, 3), unbiased=True)
    with pytest.raises(PalimpsestError, match="compares the same records: 4 of one network, 5 of the other"):
        linear_cka(draw(1, 4, 3), draw(2, 5, 3))
    with pytest.raises(PalimpsestError, match="not finite"):
        linear_cka(draw(1, 4, 3) / 0, draw(2, 4, 3))


# --- out of a network ------------------------------------------------------------------------------------------------


def collected(model, records, wanted, **fields):
    found = {}
    for part in representations(model, records, wanted, quiet(), **fields):
        for name, values in part.layers.items():
            found.setdefault(name, {}).update(zip(part.index.tolist(), values, strict=True))
    return {name: torch.stack([rows[i] for i in range(len(records))]) for name, rows in found.items()}


def alone(model, record, modules):
    with capture(modules) as outputs, torch.no_grad():
        if record.image is not None:
            model.network(pixel_values=record.image[None])
        else:
            model.network(input_ids=torch.tensor([Encoder.of(model).record(record).tokens]))
    return outputs


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("pool", ["auto", "first", "last"])
def test_representations_are_those_of_single_records(name, pool):
    model, records = roughened(name), some_records(name)
    found = collected(model, records, "block", pool=pool, batch_size=3)
    modules = {key: model.network.get_submodule(key) for key in found}
    assert len(modules) >= 2
    for place, record in enumerate(records):
        outputs = alone(model, record, modules)
        for key, values in outputs.items():
            rows = values[0].flatten(1).T if values.ndim == 4 else values[0]
            expected = {"auto": rows.mean(0), "first": rows[0], "last": rows[-1]}[pool]
            torch.testing.assert_close(found[key][place], expected, rtol=1e-4, atol=1e-5)
    assert no_hooks_left(model.network)


def test_over_scored_tokens_the_prompt_does_not_count(llama):
    records = people()[:3]
    found = collected(llama, records, "block", pool="targets", layers=[1])
    ((key, values),) = found.items()
    for place, record in enumerate(records):
        start = Encoder.of(llama).record(record).start
        expected = alone(llama, record, {key: llama.network.get_submodule(key)})[key][0, start:].mean(0)
        torch.testing.assert_close(values[place], expected, rtol=1e-4, atol=1e-5)


def test_two_networks_are_compared_layer_by_layer(llama, vit):
    records = people()[:8]
    other = llama.copy()
    with torch.no_grad():
        other.network.model.layers[1].mlp.down_proj.weight.mul_(8)
    found = compare_representations(llama, other, records, "block", quiet(), batch_size=3)
    assert found["model.layers.0"].cka() == pytest.approx(1)
    assert found["model.layers.1"].cka() < 0.999
    x, y = (collected(m, records, "block")["model.layers.1"] for m in (llama, other))
    assert found["model.layers.1"].cka() == pytest.approx(gram_cka(x, y), abs=1e-8)
    with pytest.raises(PalimpsestError):
        compare_representations(llama, vit, records, "block", quiet())


def test_unknown_poolings_are_named(llama, vit):
    with pytest.raises(PalimpsestError, match=r"pool is 'max'"):
        next(representations(llama, people()[:2], "block", quiet(), pool="max"))
    with pytest.raises(PalimpsestError, match="a classifier has no scored tokens"):
        next(representations(vit, some_records("vit"), "block", quiet(), pool="targets"))
    with pytest.raises(PalimpsestError, match="Choose another module"):
        next(representations(llama, people()[:2], "unembedding", quiet()))


def test_the_gram_form_and_the_sums_agree():
    x, y = draw(5, 40, 30), draw(6, 40, 25)
    y[:, :5] += x[:, :5]
    summed, held = CrossProducts(), CrossProducts()
    for start in range(0, 40, 7):
        summed.add(x[start : start + 7], y[start : start + 7])
    wide = torch.zeros(40, 50, dtype=torch.float64)  # more dimensions than records: zeros add nothing to either form
    held.add(torch.cat([x, wide], 1), torch.cat([y, wide], 1))
    assert summed._shift is not None  # what is compared are two forms
    assert held._shift is None
    assert held.cka() == pytest.approx(summed.cka(), abs=1e-10)
    assert held.unbiased_cka() == pytest.approx(summed.unbiased_cka(), abs=1e-10)


@pytest.mark.parametrize("n", [9, 3])
def test_which_network_has_collapsed_is_told_whatever_the_size_of_the_other(n):
    sums = CrossProducts()
    sums.add(torch.full((n, 4), 1e6) + 1e-3 * draw(1, n, 4).float(), 1e-6 * draw(2, n, 4))  # lost in rounding
    assert sums.collapsed() == (True, False)
    assert math.isnan(sums.cka())


def test_the_mean_over_batches_is_higher_than_cka_over_all():
    x, y = draw(1, 65, 8), draw(2, 65, 8)
    batches = [gram_cka(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    assert batch_mean_cka(x, y, 16) == pytest.approx(sum(batches) / 4)  # the last record is a batch without a CKA
    assert batch_mean_cka(x, y, 16) > linear_cka(x, y) + 0.1
    order = x[:, 0].argsort()
    assert batch_mean_cka(x[order], y[order], 16) != pytest.approx(batch_mean_cka(x, y, 16), abs=1e-3)
    with pytest.raises(PalimpsestError, match="batches of at least 3 records, found 2"):
        batch_mean_cka(x, y, 2)
    with pytest.raises(PalimpsestError, match="same records: 65 of one network, 64"):
        batch_mean_cka(x, y[1:], 16)
    with pytest.raises(PalimpsestError, match="at least 3 records, found 2"):
        batch_mean_cka(x[:2], y[:2], 16)


@pytest.mark.parametrize("name", ["vit", "convnet"])
def test_the_input_of_a_head_is_what_it_makes_logits_of(name):
    model, records = roughened(name), some_records(name)
    (head,) = (part.name for part in anatomy(model.network).find("classifier_head"))
    found = collected(model, records, head, inputs=head, batch_size=3)
    torch.testing.assert_close(model.network.get_submodule(head)(found[f"{head}:input"]), found[head])
    expected = torch.cat([model.network(pixel_values=record.image[None]).logits for record in records])
    torch.testing.assert_close(found[head], expected, rtol=1e-4, atol=1e-5)
    assert no_hooks_left(model.network)


def test_the_head_of_a_text_classifier_reads_the_last_token():
    model = build_text_classifier()
    records = [Record(text=text, label=i % 3) for i, text in enumerate(NEUTRAL)]
    found = collected(model, records, "score", inputs="score", batch_size=2)
    for place, record in enumerate(records):
        logits = model.network(**model.tokenizer(record.text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(found["score"][place], logits, rtol=1e-4, atol=1e-5)
