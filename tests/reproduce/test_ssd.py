from __future__ import annotations

import json

import pytest
import torch

from memorised import quiet
from one_by_one import roughened, some_records
from palimpsest.audit.reading import Reading, Value
from palimpsest.data.records import Roles
from palimpsest.erase.ssd import SSD
from palimpsest.models.model import Model
from palimpsest.report.evidence import Evidence, ModelEvidence
from palimpsest.reproduce.ssd import CHOSEN, COLUMNS, METHODS, Batches, Control, Measures, judge
from palimpsest.system import slug_of, to_dict

SECONDS = ("learning_seconds", "importance_seconds", "deletion_seconds")
GOOD = {
    "before": (1.0, 1.0, 0.98, 0.9, None, 8.0, 1.0, 0.3),
    "gold": (0.0, 0.0, 0.98, 0.01),
    **dict.fromkeys(METHODS, (0.0, 0.0, 0.97, 0.02, 0.02)),
    "random weights": (0.9, 0.9, 0.8, 0.8),
    "smallest weights": (1.0, 1.0, 0.98, 0.9),
    "ssd, mini-batches shuffled": (0.0, 0.0, 0.3, 0.2),
}


def evidence(table):
    models = []
    for title, numbers in table.items():
        names = (*COLUMNS.values(), *SECONDS)
        found = [Value(name=n, value=x, n=9) for n, x in zip(names, numbers, strict=False) if x is not None]
        method = METHODS.get(title)
        models.append(
            ModelEvidence(
                name=title if method is None else slug_of(method),
                part="erased",
                title=title,
                settings={} if method is None else json.loads(json.dumps(to_dict(method))),
                readings=(Reading(probe="all", values=tuple(found)),),
            )
        )
    return Evidence(title="", models=tuple(models))


def test_a_table_as_in_the_specification_holds():
    found = judge(evidence(GOOD))
    assert found.verdict == "holds"
    assert [row["model"] for row in found.rows] == ["before", "gold", *METHODS]
    assert found.rows[0]["selected"] == "-"
    assert "a deletion with them stored 0.30 s" in found.note


@pytest.mark.parametrize(
    ("name", "numbers", "failing"),
    [
        (CHOSEN, (0.3, 0.3, 0.97, 0.02), 0),
        (CHOSEN, (0.0, 0.0, 0.94, 0.02), 1),
        (CHOSEN, (0.0, 0.0, 0.97, 0.1), 2),
        ("before", (1.0, 1.0, 0.98, 0.9, None, 8.0, 1.0, 0.9), 3),
        ("random weights", (0.1, 0.1, 0.9, 0.1), 4),
        ("smallest weights", (0.0, 0.0, 0.97, 0.1), 5),
        ("ssd, mini-batches sorted by class", (0.2, 0.2, 0.97, 0.1), 6),
        ("ssd, mini-batches shuffled", (0.0, 0.0, 0.9, 0.1), 7),
    ],
)
def test_every_part_of_the_claim_can_fail(name, numbers, failing):
    found = judge(evidence({**GOOD, name: numbers}))
    assert [check.verdict for check in found.checks].index("does not hold") == failing
    assert found.verdict == "does not hold"


GIVEN = Roles(train=some_records("vit"), forget=some_records("vit")[:2])


@pytest.mark.parametrize("kind", ["random", "smallest"])
def test_a_control_changes_as_many_weights_as_ssd(kind):
    model = roughened("vit")
    ssd = SSD(alpha=2.0).apply(model, GIVEN, quiet())
    control = Control(kind=kind, alpha=2.0).apply(model, GIVEN, quiet())

    def changed(other):
        pairs = zip(model.network.parameters(), other.network.parameters(), strict=True)
        return torch.cat([(a != b).flatten() for a, b in pairs])

    expected = round(ssd.ledger.entries[-1].notes["selected"] * model.parameters)
    assert abs(int(changed(control).sum()) - expected) <= 0.02 * expected  # some weights are 0 before
    assert not torch.equal(changed(control), changed(ssd))


def test_mini_batches_depend_on_the_order_of_the_data():
    model = roughened("vit")
    digests = {
        order: Batches(order=order, alpha=1.2).apply(model, GIVEN, quiet()).digest() for order in ("class", "shuffled")
    }
    by_hand = sorted(GIVEN.train, key=lambda record: record.label)
    sorted_ssd = SSD(alpha=1.2, mode="batch").apply(model, GIVEN.replace(train=by_hand), quiet())
    assert digests["class"] == sorted_ssd.digest()


def test_the_measures_are_seconds_and_the_share_selected():
    model = roughened("vit")
    edited = SSD(alpha=2.0).apply(model, GIVEN, quiet())
    found = {v.name: v.value for v in Measures().measure(edited, GIVEN, quiet()).values}
    assert found["selected"] == edited.ledger.entries[-1].notes["selected"]
    assert set(found) == {"selected", *SECONDS}
    again = SSD(alpha=2.0).apply(Model(edited.network, ledger=edited.ledger), GIVEN, quiet())
    assert [v.name for v in Measures().measure(again, GIVEN, quiet()).values] == ["selected"]
