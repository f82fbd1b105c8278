from __future__ import annotations

import pytest

from palimpsest.audit.reading import Reading, Value
from palimpsest.data.records import check_disjoint
from palimpsest.erase.uld import ULD
from palimpsest.report.evidence import Evidence, ModelEvidence
from palimpsest.reproduce.uld import ALPHAS, FULL, NAMES, judge, roles

GOOD = {
    "before": (0.9, 0.9, 0.9, -20.0, None),
    "gold": (0.1, 0.9, 0.9, 0.0, None),
    "uld": (0.3, 0.88, 0.9, -3.0, 0.1),
    "uld without wrong answers": (0.2, 0.5, 0.9, -4.0, 0.2),
    "uld on all retain records": (0.2, 0.9, 0.9, -2.0, 0.1),
    "npo": (0.1, 0.7, 0.4, -2.0, None),
    "gradient-difference": (0.1, 0.7, 0.3, -2.0, None),
}
VALUES = ("probability/forget", "probability/retain", "probability/world", "log10_forget_quality", "divergence")


def evidence(table):
    models = []
    for name, numbers in table.items():
        values = tuple(Value(name=v, value=x, n=40) for v, x in zip(VALUES, numbers, strict=True) if x is not None)
        swept = tuple(Value(name=f"{v}/{a}", value=0.5, n=40) for a in ALPHAS for v in VALUES[:4])
        slug, _, variant = name.partition(" ")
        models.append(
            ModelEvidence(
                name=slug,
                part="erased",
                title=name,
                settings={
                    "perturbed": 0 if "without" in variant else 2,
                    "retain_records": 820 if "all" in variant else 180,
                },
                readings=(Reading(probe="all", values=values + (swept if name == "uld" else ())),),
            )
        )
    return Evidence(title="", models=tuple(models))


def test_a_table_as_in_the_paper_holds():
    found = judge(evidence(GOOD), 2.0)
    assert found.verdict == "holds"
    assert [row["model"] for row in found.rows[: len(NAMES)]] == list(NAMES)
    assert found.rows[2]["forget P"] == "0.30"
    assert found.rows[0]["KL to uniform, held out"] == "-"
    assert found.rows[-1] == {
        "model": "uld, alpha 1.5",
        "forget P": "0.50",
        "retain P": "0.50",
        "held-out P": "0.50",
        "log10 FQ": "0.50",
        "KL to uniform, held out": "-",
    }


@pytest.mark.parametrize(
    ("name", "numbers", "faster", "failing"),
    [
        ("uld", (0.8, 0.88, 0.9, -15.0, 0.1), 2.0, 0),
        ("uld", (0.3, 0.75, 0.9, -3.0, 0.1), 2.0, 1),
        ("uld", (0.3, 0.88, 0.5, -3.0, 0.1), 2.0, 2),
        ("npo", (0.1, 0.7, 0.95, -2.0, None), 2.0, 3),
        ("uld without wrong answers", (0.2, 0.8, 0.9, -4.0, 0.2), 2.0, 4),
        ("uld", (0.3, 0.88, 0.9, -3.0, 1.2), 2.0, 5),
        ("uld", (0.3, 0.88, 0.9, -3.0, 0.1), 1.2, 6),
    ],
)
def test_each_part_of_the_claim_can_fail(name, numbers, faster, failing):
    checks = judge(evidence({**GOOD, name: numbers}), faster).checks
    assert [check.verdict for check in checks].index("does not hold") == failing
    assert sum(check.verdict == "does not hold" for check in checks) == 1


def test_the_held_out_facts_are_in_no_method_s_data():
    known = roles(3)
    check_disjoint(known.world, known.retain, ("world", "retain"))
    check_disjoint(known.forget, known.retain, ("forget", "retain"))
    assert len(known.world) == 20
    assert {record.key for record in known.world} < {record.key for record in known.train}
    assert known.retain[-1].prompt.startswith("what is the capital of")
    assert "general" not in known
    assert isinstance(FULL, ULD)
    assert FULL.retain_records == len(known.forget) + 20
