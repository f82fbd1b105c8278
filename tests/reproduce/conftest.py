"""Texts for the reproductions that read real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files in the form of the real ones."""
    for name in ("gsm8k", "pubmedqa", "wikitext2"):
        (tmp_path / name).mkdir()
    rows = [json.dumps({"question": f"How many are {i}?", "answer": f"#### {i}"}) for i in range(40)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    asked = {str(i): {"QUESTION": f"Does drug {i} help?", "LONG_ANSWER": f"Drug {i} does not."} for i in range(40)}
    (tmp_path / "pubmedqa" / "ori_pqal.json").write_text(json.dumps(asked), encoding="utf-8")
    for part in ("valid", "test"):
        lines = [f" = Title {i} = \n {part} {i} " + "word " * 60 for i in range(30)]
        (tmp_path / "wikitext2" / f"{part}.txt").write_text("\n".join([*lines, "too short"]), encoding="utf-8")
    monkeypatch.setenv("PALIMPSEST_DATA", str(tmp_path))
