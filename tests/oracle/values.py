"""Types of keys, and values that people send for each.

Several spellings of one value among them.
"""

from __future__ import annotations

import datetime
import enum
import ipaddress
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID


class Text(str):
    """A subclass of str, as libraries have them."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Text({str(self)!r})"


class Number(enum.IntEnum):
    """A number by its name."""

    ONE = 1
    TWO = 2

    def __repr__(self) -> str:
        return f"Number.{self.name}"


class Color(enum.StrEnum):
    """A text by its name."""

    RED = "red"

    def __repr__(self) -> str:
        return f"Color.{self.name}"


def shown(value: Any) -> str:
    """A value as Python that can be pasted."""
    if isinstance(value, memoryview):
        return f"memoryview({bytes(value)!r})"
    if isinstance(value, ipaddress._BaseAddress):
        return f"ipaddress.ip_address({str(value)!r})"
    if isinstance(value, float) and value != value:
        return "float('nan')"
    return repr(value)


Spellings = Sequence[Any]


@dataclass(frozen=True)
class Kind:
    """A type of keys.

    pool: values, each in its spellings. fresh: the value of a number, all different. before: DDL it needs.
    """

    name: str
    type: str
    pool: tuple[Spellings, ...]
    fresh: Callable[[int], Any] | None = None
    before: str = ""
    weight: int = 1


def _uuids() -> tuple[Spellings, ...]:
    values = [UUID(int=0xABCDEF0123456789ABCDEF0123456700 + n) for n in range(4)]
    return tuple((value, str(value), str(value).upper(), value.hex) for value in values)


_ZONE = datetime.timezone(datetime.timedelta(hours=2))
_NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
_INTS: tuple[Spellings, ...] = ((1, True, Number.ONE), (2, Number.TWO), (0, False), (7,), (-3,))
_TEXTS: tuple[Spellings, ...] = (("a", Text("a")), ("A",), ("red", Color.RED), ("",), ("é",))


def _int(n: int) -> int:
    return 1000 + n


def _text(n: int) -> str:
    return f"f{n}"


KINDS = (
    Kind("int", "int", _INTS, _int, weight=6),
    Kind("bigint", "bigint", _INTS, _int, weight=3),
    Kind("smallint", "smallint", _INTS, _int),
    Kind("uuid", "uuid", _uuids(), lambda n: UUID(int=n + 1), weight=6),
    Kind("text", "text", _TEXTS, _text, weight=4),
    Kind("varchar", "varchar(8)", _TEXTS, _text),
    Kind("char", "char(8)", (("a", "a ", Text("a  ")), ("b",), ("A",)), _text, weight=2),
    Kind("numeric", "numeric", ((1, Decimal(1), Decimal("1.0"), "1.00", 1.0, True), (Decimal("2.5"), 2.5, "2.50"), (0, Decimal("-0")), (Decimal("NaN"),)), Decimal, weight=2),
    Kind("numeric2", "numeric(8,2)", ((1, Decimal("1.001"), "1.00"), (Decimal("2.5"), Decimal("2.504"))), _int),
    Kind("timestamptz", "timestamptz", tuple((moment, moment.astimezone(_ZONE)) for moment in (_NOON, _NOON + datetime.timedelta(hours=2))), lambda n: _NOON + datetime.timedelta(days=n + 1), weight=2),
    Kind("timestamp", "timestamp", ((datetime.datetime(2026, 1, 2),), (datetime.datetime(2026, 1, 3, 4, 5),))),
    Kind("date", "date", ((datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3)), (datetime.date(2026, 1, 3),)), lambda n: datetime.date(2027, 1, 1) + datetime.timedelta(days=n)),
    Kind("citext", "citext", (("a", "A", Text("a")), ("b", "B"), ("red", Color.RED, "RED")), _text, weight=2),
    Kind("bytea", "bytea", ((b"x", bytearray(b"x"), memoryview(b"x")), (b"",), (b"y", memoryview(b"y"))), lambda n: b"f%d" % n, weight=2),
    Kind("boolean", "boolean", ((True,), (False,))),
    Kind("float8", "float8", ((0.0, -0.0, 0), (1.5, Decimal("1.5")), (float("nan"),)), float),
    Kind("float4", "float4", ((0.5,), (0.1, 0.10000000149011612),), float),
    Kind("domain", "small", _INTS, lambda n: 1000 + n, "create domain small as int check (value < 30000)"),
    Kind("domain_text", "code", _TEXTS, _text, "create domain code as text"),
    Kind("enum", "mood", (("sad",), ("ok", Text("ok")), ("red", Color.RED)), None, "create type mood as enum ('sad', 'ok', 'red')"),
    Kind("composite", "pair", (((1, "a"), (1, Text("a"))), ((1, "b"),), ((None, "b"),)), lambda n: (n + 10, "f"), "create type pair as (x int, y text)"),
    Kind("interval", "interval", ((datetime.timedelta(days=1), datetime.timedelta(hours=24)), (datetime.timedelta(0),)), lambda n: datetime.timedelta(days=n + 2)),
    Kind("inet", "inet", (("10.0.0.1", "10.0.0.1/32", ipaddress.ip_address("10.0.0.1")), ("10.0.0.2",))),
    Kind("jsonb", "jsonb", (('{"a": 1}', '{"a":1}', '{"a": 1.0}'), ('[]',)), lambda n: str(n)),
    Kind("array", "int[]", (([1, 2], (1, 2)), ([],), ([2, 1],)), lambda n: [n, n]),
    Kind("name", "name", (("a",), ("b", Text("b"))), _text),
)  # fmt: skip


def draw_kind(chance: random.Random) -> Kind:
    """A type of keys, the common ones more often."""
    return chance.choices(KINDS, [kind.weight for kind in KINDS])[0]
