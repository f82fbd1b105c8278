"""One row of a table, a file or a dictionary as a record: which column is which field, and whether it can be one."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.data.records import FIELDS, Record
from palimpsest.errors import PalimpsestError

SYNONYMS = {
    "prompt": ("question", "instruction", "input"),
    "answer": ("response", "completion", "output", "target"),
    "paraphrase": ("paraphrased_answer",),
    "wrong": ("perturbed_answer",),
    "paraphrased_prompt": ("paraphrased_question",),
    "subject": ("name", "author", "person"),
}
TEXT_FIELDS = {"text", "prompt", "answer", "subject", "paraphrase", "paraphrased_prompt"}
Row = Mapping[str, Any]


def record_of(row: Row, where: str, fields: Mapping[str, str] | None = None, folder: Path = Path()) -> Record:
    """The record of a row, whose columns may have the usual names; `fields` maps fields of a record to columns.

    Other columns are left out; one without a value counts as absent. An image may be a path, seen from `folder`.
    """
    columns = columns_of(row, fields or {})
    values = {field: row[column] for field, column in columns.items()}
    # Alpaca's layout: an instruction, and the input that it is about.
    if columns.get("prompt") == "instruction" and "input" not in columns.values() and row.get("input"):
        values["prompt"] = f"{values['prompt']}\n\n{row['input']}"
    for field, value in values.items():
        _check_value(field, value, columns[field], where)
    _check_complete(row, values, set(columns.values()), where, renames=fields is not None)
    if isinstance(values.get("image"), str):
        from palimpsest.data.pictures import opened

        values["image"] = opened(folder / values["image"], where)
    return Record(**values)


def columns_of(row: Row, fields: Mapping[str, str]) -> dict[str, str]:
    """Which column of the row each field comes from; columns without a value count as absent."""
    present = [column for column, value in row.items() if not _is_absent(value)]
    chosen = {field: column for field, column in fields.items() if column in present}
    for field in sorted(FIELDS - set(fields)):
        for column in (field, *SYNONYMS.get(field, ())):
            if column in present and column not in fields.values():
                chosen[field] = column
                break
    return chosen


def _check_value(field: str, value: Any, column: str, where: str) -> None:
    if field in TEXT_FIELDS:
        expected, right = "text", isinstance(value, str)
    elif field == "wrong":
        expected, right = "a list of texts", _is_list(value) and all(isinstance(item, str) for item in value)
    elif field == "messages":
        expected = 'a list of {"role": text, "content": text}'
        right = _is_list(value) and bool(value) and all(_is_message(item) for item in value)
    elif field == "label":
        expected, right = "a whole number", isinstance(value, numbers.Integral) and not isinstance(value, bool)
    else:
        return
    named = f'field "{field}"' + (f' (column "{column}")' if column != field else "")
    if not right:
        found = f"{kind_of_value(value)}: {_short(value)}"
        raise PalimpsestError(f"{where}: {named} must be {expected}, not {found}. Correct it, or rename the column.")
    if field in ("prompt", "answer", "text") and not value.strip():
        raise PalimpsestError(f"{where}: {named} is empty. Fill it in, or remove the record.")


def _check_complete(row: Row, values: Row, used: set[str], where: str, renames: bool) -> None:
    if "prompt" in values or "answer" in values:
        missing = [field for field in ("prompt", "answer") if field not in values]
    else:
        missing = [] if {"text", "messages", "image"} & set(values) else ["text"]
    if not missing:
        return
    free = [column for column, value in row.items() if column not in used and isinstance(value, str)]
    wanted = ["prompt", "answer"] if missing == ["text"] and len(free) > 1 else missing[:1]
    named = dict(zip(wanted, free, strict=False))
    words = " ".join(word for pair in named.items() for word in pair)
    rename = f"Rename it, or pass fields={json.dumps(named)} (--fields {words})." if renames else "Rename it."
    remedy = rename if free else "Add it."
    found = ", ".join(row) or "nothing"
    raise PalimpsestError(f'{where}: field "{missing[0]}" is missing (found: {found}). {remedy}')


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas fills gaps with NaN


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and all(isinstance(item.get(part), str) for part in ("role", "content"))


def kind_of_value(value: Any) -> str:
    """What a value is called where it is refused."""
    if _is_list(value):
        return "a list"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "..."
