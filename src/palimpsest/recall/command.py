"""`palimpsest recall SYSTEM ACTION`: what can be done with a store on the command line."""

# annotations are evaluated: tyro reads the types of classes that are made inside functions
# mypy: disable-error-code="valid-type,misc,name-defined"

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.options import flat, parse, positional
from palimpsest.recall.finding import Ranking
from palimpsest.recall.memories import View
from palimpsest.system import catalogue, system_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Which store, and whose memories."""

    store: str
    """file of the store, or a postgresql:// address"""
    user: str = "default"
    """whose memories"""
    agent: str | None = None
    """which agent's"""
    run: str | None = None
    """which conversation's"""
    encoder: str | None = None
    """the store's own by default, all-MiniLM-L6-v2 for a new one"""

    def open(self, slug: str, *, must_exist: bool = True, **how: Any) -> Any:
        """The memory that is meant."""
        scope = {"user": self.user, "agent": self.agent, "run": self.run}
        opened: Any = system_class(slug)
        return opened.open(self.store, encoder=self.encoder, must_exist=must_exist, **scope, **how)


Where = Annotated[StoreOptions, flat()]


def command(words: list[str]) -> int:
    """`palimpsest recall`."""
    slugs = [slug for slug, facts in catalogue().items() if facts.verb == "recall"]
    usage = f"palimpsest recall SYSTEM ACTION --store FILE ...\n\nsystems: {', '.join(slugs)}\nactions:\n"
    usage += "\n".join(f"  {name:<10} {(action.__doc__ or '').splitlines()[0]}" for name, action in ACTIONS.items())
    if not words or words[0].startswith("-"):
        print(usage)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    if words[0] not in slugs:
        raise PalimpsestError(f"there is no system {words[0]!r} under recall. {nearest(words[0], slugs)}")
    if len(words) < 2 or words[1].startswith("-"):
        print(usage)
        return 0 if words[1:2] in (["-h"], ["--help"]) else 2
    if words[1] not in ACTIONS:
        raise PalimpsestError(f"recall {words[0]} has no action {words[1]!r}. {nearest(words[1], ACTIONS)}")
    ACTIONS[words[1]](words[0], words[2:])
    return 0


def _add(slug: str, words: list[str]) -> None:
    """store texts: as words, or one a line from standard input"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        texts: positional(tuple[str, ...]) = ()
        """what to remember; standard input by default"""
        metadata: dict[str, str] = dataclasses.field(default_factory=dict)
        """fields to filter by: --metadata topic travel"""
        expires_in: float | None = None
        """days until it expires"""
        pinned: bool = False
        """never fades"""

    options = _parsed(Options, words, f"recall {slug} add")
    import time

    from palimpsest.data.records import Record

    texts = options.texts or tuple(line.rstrip("\n") for line in sys.stdin if line.strip())
    if not texts:
        raise PalimpsestError("there is nothing to add: no text was given, and standard input is empty.")
    expires = None if options.expires_in is None else time.time() + 86400 * options.expires_in
    about = {"metadata": options.metadata, "expires": expires, "pinned": options.pinned}
    with options.where.open(slug, must_exist=False) as memory:
        for identity in memory.items.add([Record(text=text) for text in texts], **about):
            print(identity)


def _search(slug: str, words: list[str]) -> None:
    """find what is nearest to some words"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        query: positional(str)
        """what to look for"""
        limit: int = 10
        """how many"""
        ranking: Ranking = "dense"
        """dense: by meaning; words: by BM25; fused: by both"""
        view: View = "current"
        """all: what was superseded, faded or expired as well"""
        filter: str | None = None
        """JSON filter on metadata: '{"topic": "travel"}'"""
        diversity: float = 0.0
        """0 to 1: how much the results should differ from each other"""
        touch: bool = False
        """count it as use, which delays fading"""
        json: bool = False
        """machine-readable, with the reasons for every score"""

    options = _parsed(Options, words, f"recall {slug} search")
    how = {name: getattr(options, name) for name in ("ranking", "view", "diversity", "touch")}
    how["where"] = _filter(options.filter)
    with options.where.open(slug) as memory:
        hits = memory.search(options.query, options.limit, **how)
    if options.json:
        found = [
            {"identity": h.identity, "text": h.text, "why": dict(h.why), "metadata": h.memory.metadata} for h in hits
        ]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for hit in hits:
        print(f"{hit.identity:>8}  {hit.score:.3f}  turn {hit.memory.turn}  {hit.text.strip()}")


def _update(slug: str, words: list[str]) -> None:
    """replace a memory; the history keeps what it was"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        identity: positional(str)
        """which memory"""
        text: positional(str)
        """its new text"""
        supersede: bool = False
        """keep the old one as what held until now"""

    options = _parsed(Options, words, f"recall {slug} update")
    from palimpsest.data.records import Record

    with options.where.open(slug) as memory:
        if options.supersede:
            print(memory.items.supersede(options.identity, Record(text=options.text)))
        else:
            memory.update(options.identity, Record(text=options.text))
            print(options.identity)


def _forget(slug: str, words: list[str]) -> None:
    """delete memories for good, so that no byte of them is left"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        identities: positional(tuple[str, ...]) = ()
        """which memories"""
        containing: str | None = None
        """all that hold this text, in any case"""
        filter: str | None = None
        """all whose metadata satisfy this JSON filter"""
        like: str | None = None
        """all that say nearly the same as this memory"""
        alike: float = 0.95
        """the cosine from which on two say nearly the same"""
        expired: bool = False
        """all that have expired"""
        faded: bool = False
        """all that have faded"""
        everything: bool = False
        """all of this user (agent, run), with the history and the name"""
        reason: str = "asked for"
        """for the history, which keeps no text"""
        dry_run: bool = False
        """say what would go"""

    options = _parsed(Options, words, f"recall {slug} forget")
    with options.where.open(slug) as memory:
        if options.everything:
            count = len(memory.items.all("all")) if options.dry_run else memory.items.forget_all()
            print(f"{'would forget' if options.dry_run else 'forgotten'}: all {count} memories of {options.where.user}")
            return
        reasons = dict.fromkeys(options.identities, options.reason)
        if options.containing or options.filter or options.like or options.expired or options.faded:
            found = memory.items.chosen(
                where=_filter(options.filter), containing=options.containing, like=options.like, alike=options.alike,
                expired=options.expired, faded=options.faded,
            )  # fmt: skip
            reasons = {**found, **reasons}
        done = memory.items.forget(reasons, dry_run=options.dry_run)
    print(f"{'would forget' if options.dry_run else 'forgotten'}: {len(done.identities)} memories")
    for identity, reason in done.reasons.items():
        print(f"{identity:>8}  {reason}")


def _history(slug: str, words: list[str]) -> None:
    """every change, oldest first; --purge deletes it for good"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        identity: positional(str | None) = None
        """only of this memory"""
        purge: bool = False
        """delete the history for good"""

    options = _parsed(Options, words, f"recall {slug} history")
    import datetime

    with options.where.open(slug, read_only=not options.purge) as memory:
        if options.purge:
            print(f"purged: {memory.items.purge_history()} entries")
            return
        for change in memory.history(options.identity):
            when = datetime.datetime.fromtimestamp(change.at).isoformat(" ", "seconds")
            print(f"{when}  {change.identity:>8}  {change.event:<10}  {change.reason or change.before or ''}".rstrip())


def _export(slug: str, words: list[str]) -> None:
    """print all memories as JSON lines"""
    options = _parsed(_plain(), words, f"recall {slug} export")
    from palimpsest.recall.portable import exported

    with options.where.open(slug, read_only=True) as memory:
        for line in exported(memory.items):
            print(line)


def _import(slug: str, words: list[str]) -> None:
    """store the memories of an export"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        file: positional(Path)
        """JSON lines; each needs a `text`, or a `prompt` with an `answer`"""

    options = _parsed(Options, words, f"recall {slug} import")
    from palimpsest.recall.portable import imported

    if not options.file.is_file():
        raise PalimpsestError(f"there is no file {options.file}.")
    with options.where.open(slug, must_exist=False) as memory, options.file.open(encoding="utf-8") as lines:
        print(f"imported: {len(imported(memory.items, lines, str(options.file)))} memories")


def _stats(slug: str, words: list[str]) -> None:
    """turns, memories and size; --out writes a page with plots"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        out: Path | None = None
        """HTML page: salience and what would fade, age against last use, recall of its own texts by age"""

    options = _parsed(Options, words, f"recall {slug} stats")
    from palimpsest.recall.page import write

    with options.where.open(slug, read_only=True) as memory:
        state, current = memory.items.state, memory.items.all()
        kept = memory.items.all("all")
        print(f"turns      {state.turn}\nmemories   {len(current)} current, {len(kept) - len(current)} others")
        print(f"bytes      {memory.items.opened.engine.bytes():,}\nencoder    {memory.items.opened.engine.encoder}")
        print(f"summary    {state.summary or '-'}")
        if options.out is not None:
            print(write(memory, options.out))


def _doctor(slug: str, words: list[str]) -> None:
    """look for damage, duplicates and waste; --scrub overwrites what deletions left behind"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where
        scrub: bool = False
        """overwrite what deletions may have left behind"""

    options = _parsed(Options, words, f"recall {slug} doctor")
    from palimpsest.recall.doctor import examined

    with options.where.open(slug) as memory:
        if options.scrub:
            memory.items.opened.engine.scrub()
        health = examined(memory.items)
    for name, value in dataclasses.asdict(health).items():
        if name != "problems":
            print(f"{name.replace('_', ' '):<16} {value:,}")
    for problem in health.problems:
        print(f"problem          {problem}")
    if health.problems:
        raise PalimpsestError(f"{options.where.store} has {len(health.problems)} problems; see above.")


def _reembed(slug: str, words: list[str]) -> None:
    """make all vectors again with --encoder"""
    options = _parsed(_plain(), words, f"recall {slug} reembed")
    if options.where.encoder is None:
        raise PalimpsestError("reembed needs --encoder NAME: the encoder from now on.")
    with dataclasses.replace(options.where, encoder=None).open(slug) as memory:
        print(f"re-embedded: {memory.items.opened.reembed(options.where.encoder)} chunks")


def _plain() -> Any:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        where: Where

    return Options


def _parsed(options: Any, words: list[str], name: str) -> Any:
    action = name.rpartition(" ")[2]
    options.__doc__ = (ACTIONS[action].__doc__ or "").capitalize() + "."
    return parse(options, words, name)


def _filter(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PalimpsestError(f"--filter is not valid JSON ({error.msg}): {text}") from None


ACTIONS: dict[str, Callable[[str, list[str]], None]] = {
    "add": _add,
    "search": _search,
    "update": _update,
    "forget": _forget,
    "history": _history,
    "export": _export,
    "import": _import,
    "stats": _stats,
    "doctor": _doctor,
    "reembed": _reembed,
}
