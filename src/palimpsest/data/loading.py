"""Records from files and the hub: JSON lines, CSV, Parquet, texts, images, datasets, under the usual column names."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from palimpsest.data.pictures import class_folders, classes
from palimpsest.data.records import FIELDS, Record, RecordLike, as_records
from palimpsest.data.rows import Row, columns_of, kind_of_value, record_of
from palimpsest.errors import PalimpsestError, nearest

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
Located = tuple[str, Row]


def load_records(
    source: str | Path | Iterable[RecordLike],
    *,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    config: str | None = None,
) -> list[Record]:
    """The records in a file (JSON lines, JSON, CSV, Parquet, text), in a folder, or in a hub dataset.

    `fields` maps fields of a record to columns, as in `{"answer": "response"}`; the usual synonyms (`question`,
    `instruction`, `output`, ...) are known without it. A text file is cut into paragraphs at blank lines, a folder
    of `.txt` files gives one record a file; rows of blank text are left out. A folder with a folder of images for each
    class gives their labels in alphabetical order; in a file an image may be a path, seen from where the file is.
    `split` and `config` (the dataset's configuration) only concern the hub.
    """
    if not isinstance(source, str | Path):
        return as_records(source)
    if not isinstance(fields, Mapping | None):
        raise PalimpsestError(f'fields is {fields!r}, expected a mapping such as {{"answer": "response"}}.')
    fields = dict(fields or {})
    for field in fields:
        if field not in FIELDS:
            raise PalimpsestError(f'a record has no field "{field}" (given in fields=). {nearest(field, FIELDS)}')
    rows = list(_rows(source, split, config))
    if not rows:
        raise PalimpsestError(f"{_label(source)}: no records in it. Check that this is the right file or split.")
    _check_columns(rows, fields, _label(source))
    folder = Path(source).expanduser().parent
    records = [record_of(row, where, fields, folder) for where, row in rows if not _is_blank(row, fields)]
    if not records:
        raise PalimpsestError(f"{_label(source)}: all records are blank. Check that this is the right file or split.")
    return records


def write_records(records: Iterable[RecordLike], path: str | Path) -> None:
    """Writes records as JSON lines, from which `load_records` makes the same records again."""
    lines = []
    for number, record in enumerate(as_records(records), start=1):
        if record.image is not None:
            raise PalimpsestError(f"record {number} has an image, which JSON lines cannot hold. Save it as Parquet.")
        row = {name: value for name, value in dataclasses.asdict(record).items() if value not in (None, ())}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _rows(source: str | Path, split: str, config: str | None) -> Iterator[Located]:
    path = Path(source).expanduser()
    if path.is_dir():
        return class_folders(path) if classes(path) else _text_folder(path)
    if not path.is_file():
        if _is_hub_name(source):
            return _hub(str(source), split, config)
        raise _not_found(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix not in FILE_TYPES:
        raise PalimpsestError(f'{path.name}: unknown file type "{path.suffix}". Known: {", ".join(FILE_TYPES)}.')
    content = _read(path)
    if not content.strip():
        raise PalimpsestError(f"{path.name}: the file is empty.")
    if path.suffix == ".txt":
        paragraphs = (part.strip() for part in re.split(r"\n\s*\n", content))
        return ((f"{path.name}, paragraph {n}", {"text": part}) for n, part in enumerate(paragraphs, start=1) if part)
    if path.suffix == ".csv":
        return _csv(content, path.name)
    if path.suffix == ".json" and content.lstrip().startswith("["):
        return _json_list(content, path.name)
    return _json_lines(content, path.name)


def _csv(content: str, name: str) -> Iterator[Located]:
    for number, row in enumerate(csv.DictReader(io.StringIO(content, newline="")), start=1):
        where = f"{name}, record {number}"
        if None in row or None in row.values():
            raise PalimpsestError(f"{where}: it has another number of cells than the first line has columns.")
        filled = {column: cell for column, cell in row.items() if cell.strip()}
        if (label := filled.get("label", "")).isdecimal():
            filled["label"] = int(label)
        yield where, filled


def _json_lines(content: str, name: str) -> Iterator[Located]:
    # Not splitlines(), which also cuts at characters that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"({error.msg}, column {error.colno})"
                raise PalimpsestError(f"{where}: not valid JSON {problem}.") from None
            yield where, _object(row, where)


def _json_list(content: str, name: str) -> Iterator[Located]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        problem = f"({error.msg}, column {error.colno})"
        raise PalimpsestError(f"{name}, line {error.lineno}: not valid JSON {problem}.") from None
    for number, row in enumerate(rows, start=1):
        where = f"{name}, record {number}"
        yield where, _object(row, where)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        found = kind_of_value(row)
        raise PalimpsestError(f'{where}: must be an object such as {{"prompt": ..., "answer": ...}}, not {found}.')
    return row


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise PalimpsestError(f"{path.name}: not a readable Parquet file ({_first_line(error)}).") from None
    # Through a Dataset, which decodes images as the hub does.
    return ((f"{path.name}, record {number}", row) for number, row in enumerate(Dataset(table), start=1))


def _text_folder(folder: Path) -> Iterator[Located]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        found = sorted({path.suffix or path.name for path in folder.iterdir()})
        raise PalimpsestError(
            f"{folder.name}: no .txt files and no folders of images in this folder (found: "
            f"{', '.join(found) or 'nothing'}). Name a single file for the other formats."
        )
    for path in files:
        content = _read(path).strip()
        if not content:
            raise PalimpsestError(f"{folder.name}/{path.name}: the file is empty.")
        yield f"{folder.name}/{path.name}", {"text": content}


def _hub(name: str, split: str, config: str | None) -> Iterator[Located]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise PalimpsestError(
            f"{name}: neither a file or folder here nor a dataset that the hub can give us ({_first_line(error)})."
        ) from error
    return ((f"{name}, record {number}", row) for number, row in enumerate(rows, start=1))


def _is_hub_name(source: str | Path) -> bool:
    name = str(source)
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not name.endswith(FILE_TYPES)


def _not_found(path: Path) -> PalimpsestError:
    if not path.parent.is_dir():
        return PalimpsestError(f"{path}: the folder {path.parent} does not exist.")
    neighbours = [other.name for other in path.parent.iterdir() if other.is_dir() or other.suffix in FILE_TYPES]
    hint = nearest(path.name, neighbours) if neighbours else "The folder has no file of a known type."
    return PalimpsestError(f"{path}: no such file. {hint}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PalimpsestError(f"{path.name}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None


def _check_columns(rows: list[Located], fields: Mapping[str, str], label: str) -> None:
    columns = {column for _, row in rows for column in row}
    for field, column in fields.items():
        if column not in columns:
            raise PalimpsestError(
                f'{label}: no record has the column "{column}" (given for "{field}"). {nearest(column, columns)}'
            )


def _is_blank(row: Row, fields: Mapping[str, str]) -> bool:
    columns = columns_of(row, fields)
    if {"prompt", "answer", "messages", "image"} & set(columns) or "text" not in columns:
        return False
    text = row[columns["text"]]
    return isinstance(text, str) and not text.strip()


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _label(source: str | Path) -> str:
    path = Path(source)
    return path.name if path.exists() else str(source)
