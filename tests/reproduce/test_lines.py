"""The parts of the LiNeS reproduction."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from memorised import quiet
from palimpsest.models.loading import load
from palimpsest.reproduce import domains, lines
from palimpsest.reproduce.lines import (
    ALPHAS,
    KINDS,
    LINES,
    MERGINGS,
    REVERSED,
    SCALES,
    SUM,
    SUM_LINES,
    TIES,
    WISE,
    Found,
    judge,
    tried,
)

ALONE = ("before", "problems alone", "abstracts alone")


def found(bends: dict[str, float], merged: dict[str, float]) -> list[Found]:
    """Two seeds: fronts from (3, 2) to (1, 3), bent below the straight line, and merged models with these losses."""
    t = np.array(ALPHAS)
    front = {title: np.stack([3 - 2 * t, 2 + t - bends[title] * t * (1 - t)], axis=1).tolist() for title in KINDS}
    models = {title: {"losses": [3.0, 3.0, 2.0], "scale": None} for title in ALONE}
    made = {title: {"losses": [loss, loss, 2.0], "scale": 0.6} for title, loss in merged.items()}
    return [{"front": front, "merged": models | made}] * 2


BENDS = {LINES: 0.5, WISE: 0.2, REVERSED: 0.0}
MERGED = dict(zip(MERGINGS, (1.5, 1.4, 1.6, 1.5), strict=True))


def test_the_verdict_follows_from_the_fronts():
    assert judge(found(BENDS, MERGED)).verdict == "holds"
    assert judge(found({LINES: 0.2, WISE: 0.2, REVERSED: 0.0}, MERGED)).verdict == "does not hold"
    assert judge(found({LINES: 0.5, WISE: 0.2, REVERSED: 0.6}, MERGED)).verdict == "does not hold"


def test_the_verdict_follows_from_the_merged_models():
    assert judge(found(BENDS, MERGED | {SUM_LINES: 1.5})).verdict == "does not hold"
    assert judge(found(BENDS, MERGED | {TIES: 1.45})).verdict == "does not hold"


def test_the_table_has_every_scaling_the_means_and_every_merging():
    rows = judge(found(BENDS, MERGED)).rows
    assert len(rows) == len(KINDS) * (len(ALPHAS) + 1) + len(ALONE) + len(MERGINGS)
    by_name = {row["model"]: row for row in rows}
    assert by_name[f"{WISE}, mean at equal domain loss"]["domain"] == "-"
    assert by_name[SUM] == {
        "model": SUM,
        "domain": "1.50 ± 0.00",
        "second domain": "1.50 ± 0.00",
        "kept text": "2.00 ± 0.00",
        "scale": "0.60 ± 0.00",
    }
    assert by_name["before"]["scale"] == "-"


def test_the_outcome_can_be_written_as_json_with_its_figure():
    outcome = judge(found(BENDS, MERGED))
    saved = json.loads(json.dumps(dataclasses.asdict(outcome)))
    assert list(saved["figures"][0]["lines"]) == list(KINDS)
    assert saved["figures"][0]["lines"][WISE][0] == pytest.approx([3 - 2 * t for t in ALPHAS])


def test_both_experiments_on_a_small_model(saved, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "load", lambda run: load(saved, run=run))
    monkeypatch.setattr(lines, "MEASURED", 4)
    result = json.loads(json.dumps(tried(3, tmp_path, quiet(), steps=2)))
    front, merged = result["front"], result["merged"]
    starts, ends = ({tuple(np.round(front[title][i], 6)) for title in (LINES, REVERSED, WISE)} for i in (0, -1))
    assert len(ends) == 1  # alpha 1 is the fine-tuned model however it goes with depth
    assert len(starts) == 3
    assert front[WISE][0] == pytest.approx([merged["before"]["losses"][i] for i in (0, 2)], abs=1e-5)
    assert front[WISE][-1] == pytest.approx([merged["problems alone"]["losses"][i] for i in (0, 2)], abs=1e-5)
    assert all(merged[title]["scale"] in SCALES for title in MERGINGS)
    assert len({tuple(merged[title]["losses"]) for title in (*ALONE, *MERGINGS)}) == len(ALONE) + len(MERGINGS)
