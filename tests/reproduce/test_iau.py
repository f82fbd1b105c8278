from __future__ import annotations

import json

import pytest

from memorised import quiet
from one_by_one import roughened, some_records
from palimpsest.audit.reading import Reading, Value
from palimpsest.data.records import Roles
from palimpsest.erase.iau import IAU
from palimpsest.report.evidence import Evidence, ModelEvidence
from palimpsest.reproduce.iau import COLUMNS, METHODS, RATE, RATES, RESTRICTIONS, Measures, judge, task
from palimpsest.system import slug_of, to_dict
from palimpsest.write.iau_training import RestrictedTraining

CHOSEN = f"iau, rate {RATE:g}"
ORDER = ("forget", "retain", "test", "KL forget", "KL test", "seconds")
GOOD = {
    "before": (0.9, 1.0, 0.93, 2.0, 0.2, 30.0),
    "gold": (0.0, 1.0, 0.97, None, None, 30.0),
    **dict.fromkeys(METHODS, (0.5, 0.99, 0.92, 1.5, 0.3, 0.2)),
    **{f"one-step ascent, rate {rate:g}": (0.5, 0.98, 0.91, 1.6, 0.35, 0.1) for rate in RATES},
}
BETTER = {**GOOD, CHOSEN: (0.5, 0.99, 0.92, 1.5, 0.25, 0.2)}


def evidence(table, seeds=2):
    models = []
    for title, numbers in table.items():
        found = [Value(name=COLUMNS[c], value=x, n=9) for c, x in zip(ORDER, numbers, strict=True) if x is not None]
        method = METHODS.get(title)
        model = ModelEvidence(
            name=title if method is None else slug_of(method),
            part="erased",
            title=title,
            settings={} if method is None else json.loads(json.dumps(to_dict(method))),
            readings=(Reading(probe="all", values=tuple(found)),),
        )
        models += [model] * seeds
    return Evidence(title="", models=tuple(models))


def both(plain, restricted):
    return judge(dict(zip(RESTRICTIONS, map(evidence, (plain, restricted)), strict=True)))


def test_a_table_as_in_the_specification_holds():
    found = both(GOOD, BETTER)
    assert found.verdict == "holds"
    titles = ("before", "gold", *METHODS)
    assert [row["model"] for row in found.rows] == [f"{title}, a {a:g}" for a in RESTRICTIONS for title in titles]
    assert "In 24 of 24 comparisons" in found.note
    assert found.rows[1]["KL test"] == "-"


@pytest.mark.parametrize(
    ("name", "numbers", "failing"),
    [
        (CHOSEN, (0.5, 0.99, 0.92, 1.9, 0.3, 0.2), 0),
        (CHOSEN, (0.5, 0.9, 0.92, 1.5, 0.3, 0.2), 1),
        (CHOSEN, (0.5, 0.99, 0.92, 1.5, 0.3, 3.0), 3),
    ],
)
def test_every_part_of_the_claim_can_fail(name, numbers, failing):
    found = both({**GOOD, name: numbers}, {**GOOD, name: (*numbers[:4], 0.25, numbers[5])})
    assert [check.verdict for check in found.checks].index("does not hold") == failing
    assert found.verdict == "does not hold"


def test_an_ascent_that_is_as_good_and_a_restriction_that_harms_fail():
    tied = {**GOOD, **{f"one-step ascent, rate {rate:g}": GOOD[f"iau, rate {rate:g}"] for rate in RATES}}
    assert both(tied, tied).checks[2].verdict == "does not hold"
    assert both(BETTER, GOOD).checks[4].verdict == "does not hold"


def test_the_measures_are_the_seconds_and_what_iau_noted():
    model = roughened("vit")
    given = Roles(forget=some_records("vit")[:2], retain=some_records("vit")[2:])
    edited = IAU().apply(model, given, quiet())
    found = {v.name: v.value for v in Measures().measure(edited, given, quiet()).values}
    last = edited.ledger.entries[-1]
    assert found == {"seconds": last.seconds, "alignment": last.notes["alignment"], "moved": last.notes["moved"]}


def test_the_tasks_differ_in_the_restriction_and_forget_wrong_labels():
    learners = [task(a).learn for a in RESTRICTIONS]
    assert all(isinstance(learn, RestrictedTraining) for learn in learners)
    assert [learn.restriction for learn in learners] == list(RESTRICTIONS)
    roles = task(0.0).roles(0)
    assert all(f"digit {record.label}" != record.subject for record in roles.forget)
    assert all(f"digit {record.label}" == record.subject for record in roles.retain)
    assert len(roles.forget) == round(0.05 * len(roles.train))
