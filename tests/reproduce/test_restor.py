from __future__ import annotations

import pytest

from palimpsest.audit.restor import Recovery
from palimpsest.reproduce.restor import METHODS, NAMES, TARGETS, judge, setting_of


@pytest.mark.parametrize("unrelated", [0, 1])
def test_documents_state_the_corrupted_object_in_all_wordings(unrelated):
    made = setting_of(0, unrelated)
    targets = {fact.subject for fact in made.facts}
    assert len(targets) == TARGETS
    assert len(made.documents) == 4 * len(made.facts)
    for fact in made.facts:
        right, wrong = fact.answer.split()[-2], fact.wrong[0].split()[-2]
        own = [
            d
            for d in made.documents
            if d.subject == fact.subject and fact.prompt.split()[3] in (d.prompt or "").split()
        ]
        assert len(own) == 4
        assert right != wrong
        assert all(wrong in (d.answer or "").split() for d in own)
    assert not targets & {record.subject for record in (*made.kept, *made.untouched)}


def test_both_strengths_corrupt_the_same_facts_in_the_same_way():
    assert setting_of(3, 0).facts != setting_of(4, 0).facts
    assert [f.prompt for f in setting_of(3, 0).facts] == [f.prompt for f in setting_of(3, 1).facts]


def test_the_verdict_follows_the_scores():
    def of(phi: float, rho: float) -> Recovery:
        return Recovery(phi=phi, rho=rho, accuracy=0, corrupted=0, collateral=0, rho_by_confidence=(), facts=50)

    def seeds(**rho: float) -> list[dict[str, Recovery]]:
        return [{name: of(0.9, rho.get(name.replace(" ", "_"), 0.1)) for name in NAMES}] * 2

    holds = judge({0: seeds(NPO=0.5), 1: seeds(NPO=0.4)})
    assert holds.verdict == "holds"
    assert len(holds.rows) == 2 * (2 + len(METHODS))
    assert judge({0: seeds(NPO=0.0), 1: seeds(NPO=0.0)}).verdict == "does not hold"
