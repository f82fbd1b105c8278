from __future__ import annotations

from memorised import data, quiet, reciting
from palimpsest.erase.gradient_ascent import GradientAscent
from palimpsest.reproduce import flat
from palimpsest.train import Training


def test_a_course_is_measured_where_it_has_forgotten_and_at_three_times_the_steps(monkeypatch):
    monkeypatch.setattr(flat, "FORGOTTEN", 0.5)
    hot = GradientAscent(training=Training(learning_rate=1e-3, epochs=90, warmup_epochs=0.0, decay="constant"))
    roles = data().replace(world=data().holdout)
    found = flat.course(hot, reciting(), roles, quiet())
    first, last = (found[point] for point in flat.POINTS)
    assert first["steps"] % flat.EVERY == 0
    assert last["steps"] == 3 * first["steps"]
    assert last["forget P"] < first["forget P"] <= 0.5
    assert last["forget CE"] > first["forget CE"]


def test_what_never_forgets_has_no_points(monkeypatch):
    monkeypatch.setattr(flat, "MOST", 4)
    cold = GradientAscent(training=Training(learning_rate=1e-9, epochs=90))
    assert flat.course(cold, reciting(), data().replace(world=data().holdout), quiet()) == {}


def test_a_method_without_points_is_no_verdict():
    point = {"forget P": 0.1, "forget CE": 2.0, "retain P": 0.5, "world P": 0.5, "steps": 8.0}
    full = {"forgotten": point, "three times": point}
    found = {name: [full] for name in ("before", *flat.METHODS)} | {"FLAT kl": [{}]}
    checks = {check.expected: check.verdict for check in flat.judge(found).checks}
    assert checks["FLAT kl: forget CE at most half of ascent's"] == "inconclusive"
    assert checks["FLAT tv: forget CE at most half of ascent's"] == "does not hold"
    assert checks["FLAT tv: world P above NPO's where both have forgotten"] == "does not hold"
    assert flat.judge(found).verdict == "does not hold"
