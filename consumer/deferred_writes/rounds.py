"""Which executions of a statement share one, judged by their arguments.

Equality of keys is PostgreSQL's: a key counts only as one of the pairs of type and class in `_KEYS`, for which equality
in Python, after normalizing, is equality in PostgreSQL. All other values run one by one. Knows values; knows no
connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from decimal import Decimal
from operator import itemgetter
from typing import Any
from uuid import UUID

from consumer.deferred_writes.statement_shape import Shape

ROWS_MIN = 8  # fewer are sent one by one: each distinct statement is prepared once on every connection
INT_MAX: Mapping[str, int] = {"int2": 2**15 - 1, "int4": 2**31 - 1, "int8": 2**63 - 1}

_BYTES_MAX = 16 << 20  # of one column in one statement, well below the 1 GiB that PostgreSQL takes
_SIZED = frozenset({str, bytes})
# The driver encodes each of these, and datetime's dates, the same alone and in an array.
_PLAIN = frozenset({type(None), bool, int, float, str, bytes, UUID, Decimal})
_UUID_TEXT = re.compile("[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}", re.ASCII)


def _uuid(value: Any) -> int | None:
    if type(value) is str:
        return int(value.replace("-", ""), 16) if _UUID_TEXT.fullmatch(value) else None
    return value.int if _is_uuid(type(value)) else None


def _is_uuid(kind: type) -> bool:
    """Whether this is the standard UUID or the driver's own."""
    return kind is UUID or (
        kind.__name__ == "UUID" and kind.__module__.startswith("asyncpg.") and issubclass(kind, UUID)
    )


def _is_plain(kind: type) -> bool:
    return kind in _PLAIN or _is_uuid(kind) or (kind.__module__ == "datetime" and kind.__name__ in ("date", "datetime"))


def _int(value: Any) -> int | None:
    return value if type(value) is int else None


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


_KEYS: Mapping[str, Callable[[Any], Hashable | None]] = {
    "int2": _int,
    "int4": _int,
    "int8": _int,
    "uuid": _uuid,
    "text": _text,
    "varchar": _text,
}
_CLASSES: Mapping[str, type] = {"int2": int, "int4": int, "int8": int, "uuid": UUID, "text": str, "varchar": str}


def are_keys(column: str, parameter: str) -> bool:
    """Whether a column can be a key compared with such a parameter."""
    return column in _KEYS and _CLASSES[column] is _CLASSES.get(parameter)


def key_of(kind: str, value: Any) -> Hashable | None:
    """Return the value as a key of a column of this type.

    Keys are equal exactly where PostgreSQL finds the values equal; None where that is unknown.
    """
    return _KEYS[kind](value)


def _keys(arguments: Sequence[Sequence[Any]], places: Sequence[int], types: Sequence[str]) -> list[Any] | None:
    """Return the key of each execution; None if any is unknown."""
    columns: list[list[Any]] = []
    for place in places:
        column = list(map(itemgetter(place), arguments))
        if set(map(type, column)) != {_CLASSES[types[place]]}:
            column = list(map(_KEYS[types[place]], column))
            if None in column:
                return None
        elif types[place] == "uuid":
            column = [key.int for key in column]
        columns.append(column)
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def split_by_key_use(
    arguments: Sequence[Sequence[Any]], shape: Shape, types: Sequence[str]
) -> list[Sequence[Sequence[Any]]] | None:
    """Split rows into runs that use each key once.

    None if values do not fit.

    types: of the parameters. An UPDATE that met one row twice would change it once only. So the first use of each key
    is in the first round, the second in the second: one key's writes keep their order. A round is sorted by key, so
    that two transactions lock rows in one order. Rows to be deleted can meet as often as they like, and all go at once.
    """
    if any(len(execution) != shape.parameters for execution in arguments):
        return None
    for column in range(shape.parameters):
        kinds = set(map(type, map(itemgetter(column), arguments)))
        if not kinds <= _PLAIN and not all(map(_is_plain, kinds)):
            return None
        if (
            kinds & _SIZED
            and sum(len(execution[column]) for execution in arguments if type(execution[column]) in _SIZED) > _BYTES_MAX
        ):
            return None
    if shape.kind == "insert":
        return [arguments]
    keys = _keys(arguments, [place for _, place in shape.keys], types)
    if keys is None:
        return None
    if shape.kind == "delete":
        return [[arguments[n] for n in sorted(range(len(keys)), key=keys.__getitem__)]]
    rounds: list[list[tuple[Any, Sequence[Any]]]] = []
    times: dict[Any, int] = {}
    for key, execution in zip(keys, arguments, strict=True):
        time = times.get(key, 0)
        times[key] = time + 1
        if time == len(rounds):
            rounds.append([])
        rounds[time].append((key, execution))
    return [[execution for _, execution in sorted(part, key=itemgetter(0))] for part in rounds]


def sum_by_key(
    arguments: Sequence[Sequence[Any]], shape: Shape, types: Sequence[str]
) -> tuple[list[Sequence[Any]], list[Sequence[Any]]] | None:
    """Sum what is added to each key.

    Returns one row for each key, and the arguments that must run one by one nevertheless.

    None when the values do not fit. types: of the parameters. A key to which numbers of both signs are added is not
    summed: on the way, its column may leave its type's range, which is an error of one message. With one sign, it does
    so at the end if ever.
    """
    if any(len(execution) != shape.parameters for execution in arguments):
        return None
    places = [place for _, place in shape.added]
    for place in places:
        if set(map(type, map(itemgetter(place), arguments))) != {int}:
            return None
    keys = _keys(arguments, [place for _, place in shape.keys], types)
    if keys is None:
        return None
    rows: dict[Any, list[Any]] = {}
    mixed: set[Any] = set()
    for number, place in enumerate(places):
        added = list(map(itemgetter(place), arguments))
        total: dict[Any, int] = {}
        for key, value in zip(keys, added, strict=True):
            total[key] = total.get(key, 0) + value
        limit = INT_MAX[types[place]]
        if max(total.values()) > limit or min(total.values()) < -limit:
            return None
        if min(added) < 0 < max(added):
            mixed |= {key for key, value in zip(keys, added, strict=True) if value > 0} & {
                key for key, value in zip(keys, added, strict=True) if value < 0
            }
        if number == 0:
            for key, first in zip(reversed(keys), reversed(arguments), strict=True):
                rows[key] = list(first)
        for key, value in total.items():
            rows[key][place] = value
    alone = [execution for execution, name in zip(arguments, keys, strict=True) if name in mixed] if mixed else []
    return [rows[key] for key in sorted(rows) if key not in mixed], alone
