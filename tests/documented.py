"""The code in the Markdown files, and the folder that it expects to run in."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from functools import cache
from pathlib import Path

from conftest import NEUTRAL, build_model
from memorised import LEARNING, data, people, quiet
from palimpsest.data.loading import write_records
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.write.finetune import Finetune

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/index.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/guides/*.md")))


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of this language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words after `palimpsest` of every command in the page; a backslash joins lines."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("palimpsest")]


def prepare(folder: Path) -> None:
    """Puts there what the pages speak of: a model, the same after it learned people, and files of records."""
    build_model("llama").save_pretrained(folder / "base-model")
    _taught().copy().save_pretrained(folder / "my-model")
    known, unseen = _known(), data().holdout
    write_records(known, folder / "people.jsonl")
    write_records(known[:4], folder / "forget.jsonl")
    write_records(known[4:], folder / "retain.jsonl")
    write_records(unseen, folder / "holdout.jsonl")
    write_records([Record(prompt=r.prompt, answer=r.answer) for r in unseen], folder / "world.jsonl")
    write_records([Record(text=text) for text in NEUTRAL], folder / "general.jsonl")
    rows = [json.dumps({"ask": record.prompt, "reply": record.answer}) + "\n" for record in known]
    (folder / "replies.jsonl").write_text("".join(rows), encoding="utf-8")


def _known() -> list[Record]:
    unseen = data().holdout
    return [record for record in people() if record not in unseen]


@cache
def _taught() -> Model:
    base = build_model("llama")
    base.ledger = dataclasses.replace(base.ledger, source="base-model")
    return Finetune(training=LEARNING).apply(base, Roles(train=_known()), quiet())
