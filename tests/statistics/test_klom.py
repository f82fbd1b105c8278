from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from palimpsest.errors import PalimpsestError
from palimpsest.statistics import klom as module
from palimpsest.statistics.klom import FEW, MAXIMUM, klom, klom_by_group, noise_floor
from palimpsest.statistics.predictions import margins


def draw(models=30, points=40, seed=0):
    """Margins of two kinds of models, with the edge cases in the first points."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (5 * torch.randn(models, points, generator=generator, dtype=torch.float64) for _ in range(2))
    p[:, 0], q[:, 0] = 5, 0
    p[:, 1], q[:, 1] = 0, 5
    p[:, 2] = q[:, 2] = 3
    p[3, 3], q[4, 4] = 1e3, -1e3
    return p, q


def slow(p, q, compat):
    """One point at a time, with numpy and scipy."""
    p, q = (q, p) if compat == "bench" else (p, q)
    p, q = np.clip(p, -100, 100), q if compat == "direct" else np.clip(q, -100, 100)
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    if compat == "closed":
        P, Q = (np.histogram(x, 20, (low, high))[0] / len(x) for x in (p, q))
        return sum(a * math.log(a / max(b, 1e-5)) for a, b in zip(P, Q, strict=True) if a > 0)
    edges = np.linspace(low, high, 20) if compat == "direct" else np.linspace(low, high if high > low else low + 1, 21)
    first = 0 if compat == "direct" else 1
    P, Q = (np.array([(np.digitize(x, edges) == i).sum() for i in range(first, first + 20)], float) for x in (p, q))
    with np.errstate(all="ignore"):
        if compat == "direct":
            return entropy(P / P.sum(), np.clip(Q / Q.sum(), 1e-5, None))
        P, Q = (x / x.sum() if x.sum() else x for x in (P, Q))
        Q = np.where(P > 0, np.maximum(Q, 1e-5), Q)
        return entropy(P, Q) if compat == "bench" else (P * np.log(np.where(P > 0, P / np.where(P > 0, Q, 1), 1))).sum()


@pytest.mark.parametrize("compat", ["closed", "direct", "bench", "easydub"])
def test_every_variant_is_its_loop_over_points(compat, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    p, q = draw()
    expected = np.array([slow(p[:, i].numpy(), q[:, i].numpy(), compat) for i in range(p.shape[1])])
    np.testing.assert_allclose(klom(p, q, compat).numpy(), expected, rtol=0, atol=1e-12, equal_nan=True)


def test_the_worked_examples():
    p, q = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 1]])[:, :, None]
    assert float(klom(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    apart = klom(torch.full((100, 1), 5.0), torch.zeros(100, 1))
    assert float(apart) == pytest.approx(11.5129, abs=1e-4)
    assert float(klom(p, p)) == 0


def test_the_published_code_drops_the_largest_margin():
    largest, others = torch.full((100, 1), 5.0), torch.zeros(100, 1)
    assert float(klom(largest, others, "easydub")) == 0
    assert float(klom(largest, others, "bench")) == 0
    assert math.isnan(klom(largest, others, "direct"))


def test_infinite_margins_are_clipped():
    p, q = draw(points=6)
    infinite = p.clone()
    infinite[0], p[0] = math.inf, 100
    torch.testing.assert_close(klom(infinite, q), klom(p, q), rtol=0, atol=0)


numbers = st.lists(st.floats(-200, 200, width=32), min_size=8, max_size=8)


@given(numbers, numbers, st.permutations(range(8)))
def test_it_has_its_bounds_and_does_not_mind_the_order_of_models(first, second, order):
    p, q = torch.tensor(first)[:, None], torch.tensor(second)[:, None]
    value = float(klom(p, q))
    assert -1e-12 <= value <= MAXIMUM + 1e-9 < 11.513
    assert float(klom(p[order], q)) == value
    assert float(klom(p, p[order])) == 0


@pytest.mark.parametrize(
    ("models", "median", "p95"), [(20, 2.96, 4.76), (50, 0.79, 1.75), (100, 0.33, 0.66), (200, 0.13, 0.29)]
)
def test_the_floor_is_the_one_that_was_measured(models, median, p95):
    floor = noise_floor(models)
    assert float(floor.median()) == pytest.approx(median, rel=0.1)
    assert float(floor.quantile(0.95)) == pytest.approx(p95, rel=0.1)


def test_groups_have_their_own_points_and_floor():
    p, q = draw(models=60)
    others = q[:, torch.arange(40)] + 0.5
    found = klom_by_group(p, q, {"forget": [0, 1], "retain": torch.arange(2, 40)}, others=others)
    values, floor = klom(p, q), klom(others, q)
    assert (found["forget"].points, found["retain"].points) == (2, 38)
    assert found["forget"].mean == pytest.approx(MAXIMUM)
    assert found["retain"].p95 == pytest.approx(float(values[2:].quantile(0.95)))
    assert found["retain"].median == pytest.approx(float(values[2:].median()))
    assert found["retain"].floor == pytest.approx(float(floor[2:].quantile(0.95)))
    gaussian = klom_by_group(p, q, {"forget": [0, 1]})["forget"].floor
    assert gaussian == pytest.approx(float(noise_floor(60).quantile(0.95)))


def test_few_models_bring_a_warning_with_the_floor():
    said = []
    p, q = draw(models=FEW - 1)
    klom_by_group(p, q, {"all": [0]}, warn=said.append)
    klom_by_group(*draw(models=FEW), {"all": [0]}, warn=said.append)
    assert len(said) == 1
    assert f"KLoM of 49 models is {float(noise_floor(49).median()):.2f} even where nothing differs" in said[0]


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 3), r"unlearned margins have shape \[1, 3\], expected .* at least two"),
        (torch.zeros(3), torch.zeros(3), r"unlearned margins have shape \[3\]"),
        (torch.zeros(3, 2), torch.zeros(4, 2), r"shape \[3, 2\], those of oracles \[4, 2\]"),
        (torch.zeros(3, 2), torch.zeros(3, 1), r"shape \[3, 2\], those of oracles \[3, 1\]"),
        (torch.zeros(3, 0), torch.zeros(3, 0), r"unlearned margins have shape \[3, 0\]"),
        (torch.zeros(3, 2), torch.tensor([[0, 0], [0, math.nan], [0, 0]]), "the oracle margin of point 1 is NaN under"),
    ],
)
def test_margins_that_do_not_fit_are_refused(p, q, message):
    with pytest.raises(PalimpsestError, match=message):
        klom(p, q)


def test_other_bad_input_is_named():
    p, q = draw()
    with pytest.raises(PalimpsestError, match=r"compat is 'esydub'. Did you mean .easydub"):
        klom(p, q, "esydub")
    with pytest.raises(PalimpsestError, match="does not clip the margins of oracles"):
        klom(p, q.clone().fill_(math.inf), "direct")
    with pytest.raises(PalimpsestError, match="the group forget has no point"):
        klom_by_group(p, q, {"forget": []})
    with pytest.raises(PalimpsestError, match="the group forget names a point outside 0 to 39"):
        klom_by_group(p, q, {"forget": [40]})


def test_a_margin_is_the_logit_of_the_probability():
    z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    assert float(margins(z, y)) == pytest.approx(0.68674, abs=1e-5)
    assert float(margins(z, y)) == pytest.approx(float(z.softmax(-1)[0, 0].logit()), abs=1e-6)
    torch.testing.assert_close(margins(z + 7, y), margins(z, y))
    many = torch.stack([z, z.flip(-1)])
    torch.testing.assert_close(margins(many, y), torch.stack([margins(z, y), margins(z.flip(-1), y)]))


def test_margins_need_a_label_and_another_one():
    with pytest.raises(PalimpsestError, match="a margin needs at least two labels"):
        margins(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    for wrong in (3, -1):
        with pytest.raises(PalimpsestError, match=f"there is a label {wrong}, expected 0 to 2"):
            margins(torch.zeros(2, 3), torch.tensor([0, wrong]))
