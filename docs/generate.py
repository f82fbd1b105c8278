"""The pages that nobody writes by hand: one per system and their overview, made from the catalogue; a hook of mkdocs.

The pages exist in memory while the site is built. Results under `docs/results` are written elsewhere and only listed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from palimpsest.system import VERBS, Facts, catalogue, create

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
MEANING = {
    "write": "gives a model memory that it lacks",
    "keep": "lets it learn without losing the old",
    "erase": "takes chosen knowledge out",
    "audit": "measures what is left, and what the data did",
    "fit": "makes it and its training fit the hardware",
    "recall": "an external memory for conversations and agents",
}


# --- hooks of mkdocs -------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Adds the generated pages and the results that exist to the navigation."""
    systems: list[Any] = ["systems/index.md"]
    for verb in VERBS:
        own = [f"systems/{slug}.md" for slug, facts in catalogue().items() if facts.verb == verb]
        if own:
            systems.append({verb: own})
    added = [{"Systems": systems}]
    if found := results():
        added.append({"Results": found})
    guides = next(i for i, entry in enumerate(config.nav) if "Guides" in entry)
    config.nav = [*config.nav[: guides + 1], *added, *config.nav[guides + 1 :]]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of all systems."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, f"systems/{name}.md", content=content))
    return files


# --- pages -----------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Markdown by page name: `index` and every slug."""
    return {"index": overview()} | {slug: page(slug, facts) for slug, facts in catalogue().items()}


def results() -> list[str]:
    """The result pages that exist, reproductions last."""
    found = sorted(RESULTS.glob("*.md")) + sorted(RESULTS.glob("reproduce/*.md"))
    return [str(path.relative_to(DOCS)) for path in found]


def overview() -> str:
    """The table of all systems by verb."""
    lines = ["# All systems", "", "Made from the source, as `palimpsest list` is."]
    for verb in VERBS:
        own = {slug: facts for slug, facts in catalogue().items() if facts.verb == verb}
        lines += ["", f"## {verb}", "", f"{MEANING[verb][0].upper()}{MEANING[verb][1:]}.", ""]
        if not own:
            lines.append("No system yet.")
            continue
        lines += table(
            ("system", "what it is", "source", "takes", "roles (optional)", "fidelity"),
            [
                (
                    f"[{slug}]({slug}.md)",
                    cell(facts.title),
                    cell(facts.paper),
                    facts.takes,
                    words(facts.needs) + (f" ({words(facts.uses)})" if facts.uses else ""),
                    facts.fidelity,
                )
                for slug, facts in own.items()
            ],
        )
    return "\n".join(lines) + "\n"


def page(slug: str, facts: Facts) -> str:
    """What is known about one system."""
    instance = create(slug)
    module = importlib.import_module(facts.module)
    lines = [f"# {facts.title}", "", *table(("fact", "value"), facts_rows(slug, facts)), ""]
    if facts.preset:
        base = type(instance).facts
        fixed = " and ".join(f"`{name}` = `{value}`" for name, value in facts.preset.items())
        lines += [f"A configuration of [{base.slug}]({base.slug}.md): {fixed}.", ""]
    if facts.deviations:
        lines += ["## Known deviations", "", *(f"- {escaped(deviation)}" for deviation in facts.deviations), ""]
    lines += ["## What it does", "", prose(inspect.getdoc(module) or ""), "", "## Use", "", *usage(slug, facts), ""]
    if rows := list(settings(instance)):
        lines += ["## Hyperparameters", ""]
        lines += table(("name", "default", "range", "meaning", "origin"), rows)
    else:
        lines.append("It has no hyperparameters.")
    reproduced = RESULTS / "reproduce" / f"{slug}.md"
    if reproduced.exists():
        told = reproduced.read_text("utf-8").strip()
        lines += [
            "",
            "## Reproduction",
            "",
            f"`palimpsest reproduce {slug}`",
            "",
            _moved(told[told.find("**Claim.") :]),  # the page has its own heading
        ]
    return "\n".join(lines) + "\n"


def _moved(told: str) -> str:
    """A page of results with the pictures and pages beside it, as seen from the pages of systems."""
    return re.sub(r"(\]\()(?=[\w-]+\.(?:svg|md)\))", r"\1../results/reproduce/", told)


def facts_rows(slug: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts table of a system."""
    yield "name", f"`{slug}`"
    yield "verb", facts.verb
    yield "source", cell(facts.paper) or "none"
    yield "takes", facts.takes
    yield "needs the roles", words(facts.needs) or "none"
    yield "uses, where given", words(facts.uses) or "none"
    yield "fidelity", facts.fidelity
    yield "class", f"`{facts.module}.{facts.qualname}`"


def usage(slug: str, facts: Facts) -> Iterator[str]:
    """The command that uses the system."""
    roles = " ".join(f"{role} {role}.jsonl" for role in sorted(facts.needs | facts.uses))
    given = f" \\\n        --role {roles}" if roles else ""
    if facts.verb == "audit":
        yield f"    palimpsest audit --model MODEL --probes {slug}{given} --out FOLDER"
    elif facts.verb == "recall":
        yield f'    palimpsest recall {slug} add "The key is under the mat." --store FILE'
        yield f'    palimpsest recall {slug} search "Where is the key?" --store FILE'
    else:
        yield f"    palimpsest {facts.verb} {slug} --model MODEL{given} --out FOLDER"


def settings(instance: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """Every hyperparameter with default, range, meaning and origin; nested ones by dotted name.

    A nested default that differs from its class's own comes from the system, and so does its origin.
    """
    yield from _settings(instance, prefix, None)


def _settings(instance: Any, prefix: str, given: str | None) -> Iterator[tuple[str, str, str, str, str]]:
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, about = getattr(instance, field.name), field.metadata
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.", about.get("origin"))
            continue
        limits = [f"{bound} {limit:g}" for bound, limit in about.get("limits", {}).items()]
        if get_origin(hints[field.name]) is Literal:
            limits = [", ".join(f"`{choice}`" for choice in get_args(hints[field.name]))]
        own = given is None or value == field.default
        origin = about.get("origin", "") if own else given
        yield (
            f"`{prefix}{field.name}`",
            f"`{value}`",
            ", ".join(limits),
            cell(about.get("help", "")),
            cell(origin or ""),
        )


# --- Markdown --------------------------------------------------------------------------------------------------------


def prose(docstring: str) -> str:
    """A docstring as Markdown: indented parts stay as they are, nothing else is taken for markup."""
    blocks = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        preformatted = block.startswith("    ")
        if preformatted and blocks and blocks[-1][0]:
            blocks[-1] = (True, f"{blocks[-1][1]}\n\n{block}")
        else:
            blocks.append((preformatted, block))
    return "\n\n".join(f"```text\n{inspect.cleandoc(text)}\n```" if raw else escaped(text) for raw, text in blocks)


def escaped(text: str) -> str:
    """Text whose special characters mean themselves, except inside backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#|])", r"\\\1", part) for part in parts)


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return escaped(" ".join(text.split()))


def words(roles: frozenset[str]) -> str:
    """Roles in order."""
    return ", ".join(f"`{role}`" for role in sorted(roles))


def table(head: tuple[str, ...], rows: Any) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
