"""What the command line reads into dataclasses: options that commands share, and the settings of systems as options."""

# annotations are evaluated: tyro reads the types of the options
# mypy: disable-error-code="valid-type,misc,name-defined,arg-type"

import dataclasses
import itertools
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.ledger import check_replaceable
from palimpsest.run import Precision


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raises where results could not go into the folder: it holds files already, or is one."""
    if folder.exists() and not folder.is_dir():
        raise PalimpsestError(f"{folder} is a file, expected a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise PalimpsestError(f"{folder} already holds files. Choose another folder, or pass --overwrite.")
        check_replaceable(folder)


def check_once(words: Sequence[str]) -> None:
    """Raises where an option is given twice: the first values would be lost without a word."""
    seen: set[str] = set()
    for word in itertools.takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if name.startswith("--") and name in seen:
            raise PalimpsestError(f"{name} is given twice. Put all values behind one: {name} A B.")
        seen.add(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the work is carried out."""

    seed: int = 0
    """random seed"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    precision: Precision = "auto"
    """auto: float32 for small models, else what is faster on this machine"""
    work: Path | None = None
    """folder for checkpoints: a command that was killed goes on from there"""
    quiet: bool = False
    """no progress bars"""

    def run(self) -> Any:
        """The `Run` that is meant."""
        from palimpsest.run import Run

        return Run(
            seed=self.seed,
            device=self.device,
            precision=self.precision,
            folder=self.work,
            progress=not self.quiet,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which records play which role: one source with a forget subject, TOFU, or a file for each role."""

    data: str | None = None
    """all records: a .jsonl, .json, .csv, .parquet or .txt file, a folder of texts, or a hub dataset"""
    forget_subject: tuple[str, ...] = ()
    """subjects in --data that are to be forgotten; the others are retained"""
    tofu: str | None = None
    """a TOFU split: forget01, forget05 or forget10"""
    tofu_source: Path | None = None
    """folder with the TOFU files; without it, the hub"""
    tofu_authors: int | None = None
    """only this many retained TOFU authors"""
    tofu_forget_authors: int | None = None
    """only this many forgotten TOFU authors"""
    role: dict[str, Path] = dataclasses.field(default_factory=dict)
    """a file for a role: --role forget a.jsonl retain b.jsonl world c.jsonl"""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """columns of your files: --fields prompt question answer reply"""

    def roles(self, needed: bool = True) -> Any:
        """The records by role; raises where nothing was named, unless nothing is needed."""
        from palimpsest.data.loading import load_records
        from palimpsest.data.records import Roles, by_subject
        from palimpsest.data.tofu import tofu

        if self.forget_subject and not self.data:
            raise PalimpsestError("--forget-subject names subjects in --data. Pass --data FILE.")
        if self.tofu and (self.data or self.role):
            raise PalimpsestError("--tofu brings all roles with it. Leave out --data and --role.")
        if self.tofu:
            return tofu(self.tofu, self.tofu_source, authors=self.tofu_authors, forget_authors=self.tofu_forget_authors)
        self._check_roles()
        named = {name: load_records(str(path), fields=self.fields or None) for name, path in self.role.items()}
        if self.data:
            records = load_records(self.data, fields=self.fields or None)
            named.setdefault("train", records)
            if self.forget_subject:
                named["forget"], named["retain"] = by_subject(records, self.forget_subject)
        if not named and needed:
            raise PalimpsestError("no data was named. Pass --data FILE, --tofu SPLIT, or --role NAME FILE.")
        return Roles(**named)

    def tell_unread(self, read: Set[str], by: str) -> None:
        """Says which of the given roles the system does not read: they are most often meant to be another role."""
        from palimpsest.run import console

        given = {**dict.fromkeys(self.role, "--role"), **({"train": "--data"} if self.data else {})}
        if self.forget_subject:
            given.pop("train", None)
        for role, where in given.items():
            if role.removesuffix("_probe") not in read:
                said = f"{by} does not read the role {role}, which {where} gives; it reads {', '.join(sorted(read))}."
                console().print(said, style="yellow", highlight=False, markup=False)

    def _check_roles(self) -> None:
        """Raises where a role is one that no system reads, or one that --data gives already."""
        from palimpsest.data.records import ROLES
        from palimpsest.system import catalogue

        read = {role for facts in catalogue().values() for role in facts.needs | facts.uses}
        for role in self.role:
            if role.removesuffix("_probe") not in read | set(ROLES):
                raise PalimpsestError(f"no system reads a role {role!r}. {nearest(role, read | set(ROLES))}")
            given = {"train": self.data, "forget": self.forget_subject, "retain": self.forget_subject}
            if given.get(role):
                what = "--data" if role == "train" else "--forget-subject"
                raise PalimpsestError(f"{what} gives the role {role} already: leave out --role {role}.")

    @property
    def source(self) -> str:
        """A few words for the report."""
        return f"TOFU {self.tofu}" if self.tofu else self.data or ", ".join(str(path) for path in self.role.values())


def parse(options: Any, words: list[str], name: str) -> Any:
    """The options that the words of a command mean; wrong ones end the program with tyro's message."""
    import tyro

    return tyro.cli(options, args=words, prog=f"palimpsest {name}")


def flat() -> Any:
    """Marks a field whose own fields appear without its name in front."""
    import tyro

    return tyro.conf.arg(name="")


def positional(of: type) -> Any:
    """Marks a word that needs no option name."""
    import tyro

    return tyro.conf.Positional[of]


def settings_type(cls: type, default: Any, given: str | None = None) -> type:
    """A dataclass for the command line with the fields of the settings, their help, origin and defaults."""
    import tyro

    hints = get_type_hints(cls)
    fields = []
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            nested = settings_type(type(value), value, field.metadata.get("origin"))
            fields.append((field.name, nested, dataclasses.field(default_factory=nested)))
            continue
        origin = given if given is not None and value != field.default else field.metadata.get("origin", "")
        meaning = f"{field.metadata.get('help', '')} [{origin}]"
        hint = Annotated[hints[field.name], tyro.conf.arg(help=meaning)]
        fields.append((field.name, hint, dataclasses.field(default=value)))
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True, namespace={"__doc__": cls.__doc__})


def flat_items(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The settings by dotted name, as `create` takes them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found.update(flat_items(value, f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = value
    return found
