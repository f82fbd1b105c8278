"""The command line: verbs and their systems, made from the dataclasses.

Results go to standard output, progress and messages to standard error. Exit codes: 0 done, 2 wrong input, 130 stopped.
"""

# annotations are evaluated: the options are classes made inside functions, and tyro reads their types
# mypy: disable-error-code="valid-type,misc,name-defined,arg-type"

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from palimpsest import __version__
from palimpsest.errors import PalimpsestError, nearest
from palimpsest.options import (
    DataOptions,
    RunOptions,
    check_free,
    check_once,
    flat,
    flat_items,
    parse,
    positional,
    settings_type,
)
from palimpsest.run import console
from palimpsest.system import VERBS, Facts, catalogue, create, facts_of

CHANGING = ("write", "keep", "erase", "fit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if words[0] in ("-V", "--version"):
            print(__version__)
            return 0
        name, rest = words[0], words[1:]
        check_once(rest)
        if name in CHANGING:
            return _change(name, rest)
        if name not in COMMANDS:
            raise PalimpsestError(f"there is no command {name!r}. {nearest(name, [*COMMANDS, *CHANGING])}")
        return COMMANDS[name](rest) or 0
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except PalimpsestError as error:
        from rich.markup import escape

        console().print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console().print(
            "stopped; with --work (or the --out of compare, reproduce, demo) the same command goes on from the last "
            "checkpoint, which is written every two minutes."
        )
        return 130


def overview() -> str:
    """The help text of the program."""
    lines = [
        "palimpsest: what a model remembers.",
        "",
        "  palimpsest list                      every system, by verb",
        "  palimpsest show SYSTEM               its facts, hyperparameters and source",
        "  palimpsest VERB SYSTEM --model M ... change a model: write, keep, erase, fit",
        "  palimpsest recall hema ACTION ...    a memory for conversations: add, search, update, forget, history, ...",
        "  palimpsest chat --store FILE         talk with a local model that remembers",
        "  palimpsest forget MODEL --about X    forget X, choosing everything for you",
        "  palimpsest audit --model M ...       measure what is left, and write the report",
        "  palimpsest compare TASK ...          methods x probes x seeds in one table",
        "  palimpsest reproduce SYSTEM          a paper's claim, tried here",
        "  palimpsest ledger FOLDER             what was done to a saved model; checks its digests",
        "  palimpsest report EVIDENCE           the HTML page of an evidence file",
        "  palimpsest people --out FOLDER       make records about fictitious people",
        "  palimpsest demo                      all of it in a few minutes, offline",
        "",
        "Every command explains itself with --help.",
    ]
    return "\n".join(lines)


def _list(words: list[str]) -> None:
    @dataclasses.dataclass
    class Options:
        """Every system, by verb."""

        verb: str | None = None
        """only the systems of this verb"""
        json: bool = False
        """machine-readable"""

    options = parse(Options, words, "list")
    if options.verb is not None and options.verb not in VERBS:
        raise PalimpsestError(f"there is no verb {options.verb!r}. {nearest(options.verb, VERBS)}")
    chosen = [facts for facts in catalogue().values() if options.verb in (None, facts.verb)]
    if options.json:
        print(json.dumps([_facts(facts) for facts in chosen], indent=1))
        return
    for verb in VERBS:
        own = [facts for facts in chosen if facts.verb == verb]
        if own:
            print(verb)
            for facts in own:
                print(f"  {facts.slug:<22} {facts.title}" + (f"  ({facts.paper})" if facts.paper else ""))


def _show(words: list[str]) -> None:
    @dataclasses.dataclass
    class Options:
        """A system's facts, hyperparameters and source."""

        system: positional(str)
        """a name that `palimpsest list` shows"""
        json: bool = False
        """machine-readable"""

    options = parse(Options, words, "show")
    facts = facts_of(options.system)
    instance = create(options.system)
    fields = list(_describe(instance))
    if options.json:
        print(json.dumps({**_facts(facts), "settings": [dict(zip(FIELD, f, strict=True)) for f in fields]}, indent=1))
        return
    import inspect

    module = inspect.getmodule(type(instance))
    print(f"{facts.slug} ({facts.verb}): {facts.title}\n")
    print(inspect.getdoc(module) or "")
    print(
        f"\npaper     {facts.paper or '-'}\ntakes     {facts.takes}\nneeds     {', '.join(sorted(facts.needs)) or '-'}"
    )
    print(f"uses      {', '.join(sorted(facts.uses)) or '-'}\nfidelity  {facts.fidelity}")
    for deviation in facts.deviations:
        print(f"differs   {deviation}")
    print(f"source    {facts.module}.{facts.qualname}\n")
    for name, default, limits, meaning, origin in fields:
        print(f"  --{name.replace('_', '-'):<26} {default!s:<12} {meaning}{limits and f' ({limits})'}  [{origin}]")


FIELD = ("name", "default", "limits", "help", "origin")


def _describe(instance: Any, prefix: str = "", given: str | None = None) -> Any:
    """Every setting by dotted name; a nested default that differs from its class's own has the origin of the system."""
    for field in dataclasses.fields(instance):
        value, about = getattr(instance, field.name), dict(field.metadata)
        if dataclasses.is_dataclass(value):
            yield from _describe(value, f"{prefix}{field.name}.", about.get("origin"))
            continue
        if given is not None and value != field.default:
            about["origin"] = given
        limits = ", ".join(f"{bound} {limit:g}" for bound, limit in about.get("limits", {}).items())
        yield f"{prefix}{field.name}", value, limits, about.get("help", ""), about.get("origin", "")


def _facts(facts: Facts) -> dict[str, Any]:
    plain = dataclasses.asdict(facts)
    sets = {name: sorted(plain[name]) for name in ("needs", "uses", "beside")}
    return plain | sets | {"deviations": list(facts.deviations)}


def _change(verb: str, words: list[str]) -> int:
    """`palimpsest VERB SYSTEM ...` for the verbs that change a model."""
    of_verb = [slug for slug, facts in catalogue().items() if facts.verb == verb]
    if not words or words[0].startswith("-"):
        print(f"palimpsest {verb} SYSTEM --model MODEL --out FOLDER ...\n\nsystems: {', '.join(of_verb) or 'none yet'}")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    slug = words[0]
    if slug not in of_verb:
        raise PalimpsestError(f"there is no system {slug!r} under {verb}. {nearest(slug, of_verb)}")
    preset = create(slug)
    settings = settings_type(type(preset), preset)

    @dataclasses.dataclass(kw_only=True)
    class Options:
        out: Path
        """folder for the changed model"""
        model: str = "smollm2-135m-instruct"
        """hub name, folder, .gguf file, or the embedded smollm2-135m-instruct"""
        overwrite: bool = False
        """replace what is in --out"""
        run: Annotated[RunOptions, flat()] = dataclasses.field(default_factory=RunOptions)
        data: Annotated[DataOptions, flat()] = dataclasses.field(default_factory=DataOptions)
        method: Annotated[settings, flat()] = dataclasses.field(default_factory=settings)
        """hyperparameters of the method"""

    Options.__doc__ = facts_of(slug).title
    options = parse(Options, words[1:], f"{verb} {slug}")
    from palimpsest.models.loading import load

    check_free(options.out, options.overwrite)
    method = create(slug, **flat_items(options.method))
    facts = facts_of(slug)
    roles = options.data.roles(needed=bool(facts.needs))
    options.data.tell_unread(facts.needs | facts.uses, by=slug)
    run = options.run.run().replace(in_place=True)
    changed = method.apply(load(options.model, run=run), roles, run)
    print(changed.save_pretrained(options.out, overwrite=options.overwrite))
    return 0


def _audit(words: list[str]) -> None:
    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Measures models and writes evidence.json and report.html."""

        model: tuple[str, ...]
        """the models to measure, for instance the erased ones"""
        out: Path
        """folder for the evidence and the report"""
        before: str | None = None
        """the model before erasing"""
        gold: str | None = None
        """a model that never saw the forget set"""
        second_gold: str | None = None
        """another one, from another seed: says how alike two such models are"""
        probes: tuple[str, ...] = ()
        """which probes; all of the standard battery by default"""
        max_new_tokens: int = 200
        """longest generated answer, tokens"""
        overwrite: bool = False
        """replace an old report in --out"""
        run: Annotated[RunOptions, flat()] = dataclasses.field(default_factory=RunOptions)
        data: Annotated[DataOptions, flat()] = dataclasses.field(default_factory=DataOptions)

    options = parse(Options, words, "audit")
    from palimpsest.audit.session import audit_saved

    page = audit_saved(
        options.model,
        options.data.roles(),
        options.out,
        options.run.run(),
        before=options.before,
        gold=options.gold,
        second_gold=options.second_gold,
        battery=options.probes or None,
        max_new_tokens=options.max_new_tokens,
        source=options.data.source,
        command=shlex.join(["palimpsest", "audit", *words]),
        overwrite=options.overwrite,
    )
    print(page)


def _ledger(words: list[str]) -> None:
    @dataclasses.dataclass
    class Options:
        """What was done to a saved model; checks the digest of its weights."""

        folder: positional(Path)
        """a folder saved by palimpsest"""
        json: bool = False
        """machine-readable"""

    options = parse(Options, words, "ledger")
    from palimpsest.ledger import verify

    saved = verify(options.folder)
    if options.json:
        print(json.dumps(saved, indent=1))
        return
    print(f"source   {saved['source'] or 'unknown'}")
    for number, entry in enumerate(saved["entries"], 1):
        how = f"seed {entry['seed']}, palimpsest {entry['version']}, {entry['seconds']:.0f} s"
        print(f"\n{number}. {entry['method']}  ({how})")
        for role, digest in entry["data"].items():
            print(f"   data     {role:<8} {digest[:16]}")
        print(f"   weights  {entry['weights_before'][:16]} -> {entry['weights_after'][:16]}")
        print(f"   settings {json.dumps(entry['settings'])}")
    print(f"\nweights  {saved['weights']} (verified)")


def _report(words: list[str]) -> None:
    @dataclasses.dataclass
    class Options:
        """The HTML page of an evidence file."""

        evidence: positional(Path)
        """evidence.json of an audit, a comparison or the demo"""
        out: Path | None = None
        """where to write it; beside the evidence by default"""
        markdown: bool = False
        """print the table as Markdown instead"""

    options = parse(Options, words, "report")
    from palimpsest.report import evidence, page, table

    loaded = evidence.load(options.evidence)
    if options.markdown:
        print(table.to_markdown(table.build(loaded)))
    else:
        print(page.write(loaded, options.out or options.evidence.with_name("report.html")))


def _people(words: list[str]) -> None:
    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Makes records about fictitious people, one JSON-lines file a role."""

        out: Path
        """folder for the files"""
        people: int = 20
        """how many people"""
        forget: int = 4
        """how many of them are to be forgotten"""
        facts: int | None = None
        """facts a person; all by default"""
        seed: int = 0
        """random seed"""

    options = parse(Options, words, "people")
    from palimpsest.data.fictitious import roles
    from palimpsest.data.loading import write_records

    made = roles(options.people, options.forget, seed=options.seed, facts_per_person=options.facts)
    if options.out.exists() and any(options.out.iterdir()):
        raise PalimpsestError(f"{options.out} already holds files. Choose another folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    for role, records in made.items():
        write_records(records, options.out / f"{role}.jsonl")
    print(options.out)


def _lazy(module: str) -> Callable[[list[str]], int | None]:
    """A command that lives in a module of its own, imported when it is asked for."""

    def command(words: list[str]) -> int | None:
        import importlib

        return importlib.import_module(module).command(words)

    return command


COMMANDS: Mapping[str, Callable[[list[str]], int | None]] = {
    "list": _list,
    "show": _show,
    "audit": _audit,
    "ledger": _ledger,
    "report": _report,
    "people": _people,
    "recall": _lazy("palimpsest.recall.command"),
    "chat": _lazy("palimpsest.recall.chat"),
    "forget": _lazy("palimpsest.forgetting"),
    "compare": _lazy("palimpsest.comparing"),
    "reproduce": _lazy("palimpsest.reproduce.runner"),
    "demo": _lazy("palimpsest.demo"),
}
