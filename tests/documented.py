"""The code in the Markdown files, and the folder that it expects to run in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from memorised import people, reciting
from palimpsest.data.loading import write_records

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
    """Puts there what the pages speak of: a model that recites people, and the people."""
    reciting().save_pretrained(folder / "my-model")
    write_records(people(), folder / "people.jsonl")
