"""Filters on metadata: `{"topic": "travel", "year": {"gte": 2020}, "OR": [...]}`.

    eq ne gt gte lt lte      compare; numbers with numbers, texts with texts
    in nin                   one of a list, none of a list
    contains icontains       part of a text (icontains: in any case), or member of a list
    wildcard                 a text with * and ?
    exists                   whether the field is there
    AND OR NOT               lists of filters; NOT: none of them holds

A field that is missing satisfies `ne`, `nin` and `{"exists": false}` only. Several fields are joined by AND. Dots reach
into nested metadata: `address.city`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from palimpsest.errors import PalimpsestError, nearest

Test = Callable[[Mapping[str, Any]], bool]
_MISSING = object()


def _ordered(holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def compare(found: Any, wanted: Any) -> bool:
        both = (found, wanted)
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in both)
        return (numbers or all(isinstance(x, str) for x in both)) and holds(found, wanted)

    return compare


def _contains(found: Any, wanted: Any) -> bool:
    if isinstance(found, str):
        return isinstance(wanted, str) and wanted in found
    return isinstance(found, list) and wanted in found


def _icontains(found: Any, wanted: Any) -> bool:
    if isinstance(found, str):
        return wanted.casefold() in found.casefold()
    return isinstance(found, list) and wanted.casefold() in [x.casefold() for x in found if isinstance(x, str)]


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda found, wanted: found is not _MISSING and found == wanted,
    "ne": lambda found, wanted: found is _MISSING or found != wanted,
    "gt": _ordered(lambda a, b: a > b),
    "gte": _ordered(lambda a, b: a >= b),
    "lt": _ordered(lambda a, b: a < b),
    "lte": _ordered(lambda a, b: a <= b),
    "in": lambda found, wanted: found is not _MISSING and found in wanted,
    "nin": lambda found, wanted: found is _MISSING or found not in wanted,
    "contains": _contains,
    "icontains": _icontains,
    "wildcard": lambda found, wanted: isinstance(found, str) and fnmatch.fnmatchcase(found, wanted),
    "exists": lambda found, wanted: (found is not _MISSING) is wanted,
}
_TAKES: dict[str, type] = {"in": list, "nin": list, "icontains": str, "wildcard": str, "exists": bool}


def compiled(where: Mapping[str, Any]) -> Test:
    """Whether metadata satisfies the filter; an unknown operator or an operand of the wrong kind raises now."""
    if not isinstance(where, Mapping):
        raise PalimpsestError(f"the filter is {where!r}, expected a dictionary of fields and conditions.")
    tests = [_test(field, condition) for field, condition in where.items()]
    return lambda metadata: all(test(metadata) for test in tests)


def _test(field: str, condition: Any) -> Test:
    if field in ("AND", "OR", "NOT"):
        if not isinstance(condition, list | tuple) or not condition:
            raise PalimpsestError(f"the filter's {field} is {condition!r}, expected a list of filters.")
        parts = [compiled(part) for part in condition]
        if field == "AND":
            return lambda metadata: all(part(metadata) for part in parts)
        if field == "OR":
            return lambda metadata: any(part(metadata) for part in parts)
        return lambda metadata: not any(part(metadata) for part in parts)
    wanted = condition if isinstance(condition, Mapping) else {"eq": condition}
    for name, operand in wanted.items():
        if name not in _OPERATORS:
            raise PalimpsestError(f"the filter on {field!r} has no operator {name!r}. {nearest(name, _OPERATORS)}")
        kind = _TAKES.get(name)
        if kind is not None and not isinstance(operand, (list, tuple) if kind is list else kind):
            raise PalimpsestError(f"the filter {field} {name} is given {operand!r}, expected a {kind.__name__}.")
    return lambda metadata: all(_OPERATORS[name](_value(metadata, field), x) for name, x in wanted.items())


def _value(metadata: Mapping[str, Any], field: str) -> Any:
    value: Any = metadata
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value
