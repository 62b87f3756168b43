"""Which write may run once for many rows instead of once for each, and how it then reads.

`insert into t values ($1, $2)` a thousand times is `insert into t select c1, c2 from unnest($1, $2)` once; an UPDATE of
rows that its WHERE tells apart likewise, in *rounds* that meet no row twice; and one that only adds to columns of such rows,
once for each row, with the *sum* of what is added. Knows SQL texts and arguments; knows no connection. Only a few shapes are read, and everything else is refused: no subquery, no function but those named here, no
RETURNING, no ON CONFLICT DO UPDATE, because each execution of such a statement may see what the one before it did. What it
does not know is the table: triggers, rules and types are looked at by consumer/columns.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any
from uuid import UUID

ROWS_MIN = 8  # fewer are sent one by one: each distinct statement is prepared once on every connection

_BYTES_MAX = 16 << 20  # of one column in one statement, well below the 1 GiB that PostgreSQL takes

# Evaluated once for each row, and never by looking at a table.
_FUNCTIONS = frozenset({"now", "gen_random_uuid", "coalesce", "greatest", "least", "nullif", "abs"})
# Words that would make an expression more than one row's arithmetic, or mean something else in a SELECT than in VALUES.
_REFUSED = frozenset(
    {
        *(
            "select",
            "with",
            "default",
            "returning",
            "from",
            "only",
            "case",
            "exists",
            "any",
            "all",
            "some",
            "array",
            "row",
        ),
        *(
            "in",
            "between",
            "like",
            "ilike",
            "similar",
            "collate",
            "over",
            "current",
            "overriding",
            "table",
            "tablesample",
        ),
    }
)
_TOKEN = re.compile(
    r"""\s+
    | (?P<parameter>\$[1-9][0-9]{0,4}(?![0-9A-Za-z_]))
    | (?P<number>[0-9]+(?:\.[0-9]+)?(?![0-9A-Za-z_.]))
    | (?P<text>'(?:[^'\\]|'')*'(?!\s*[\n\r]?\s*'))
    | (?P<quoted>"(?:[^"\\]|"")+")
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)(?!['"$\x80-\U0010ffff])
    | (?P<sign>::|\|\||<>|<=|>=|!=|[-+*/%=<>(),.])
    """,
    re.VERBOSE,
)
_PLAIN_MODULES = frozenset(
    {"builtins", "uuid", "decimal", "datetime"}
)  # of types whose values are one value each, but for:
_CONTAINERS = frozenset({list, tuple, dict, set, frozenset, bytearray, memoryview})
_KEYS = frozenset({int, str, UUID})  # equal in Python if and only if equal in PostgreSQL, for the types in KEY_TYPES
KEY_TYPES: Mapping[str, type] = {"int2": int, "int4": int, "int8": int, "uuid": UUID, "text": str, "varchar": str}
# Scalars whose arrays the driver encodes from plain Python values, and that PostgreSQL's unnest gives back unchanged.
INT_MAX: Mapping[str, int] = {"int2": 2**15 - 1, "int4": 2**31 - 1, "int8": 2**63 - 1}
TYPES = frozenset(
    {
        *("int2", "int4", "int8", "float4", "float8", "numeric", "bool", "uuid"),
        *("text", "varchar", "bytea", "date", "timestamp", "timestamptz", "json", "jsonb"),
    }
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str  # words in lower case, quoted names and all else as written


@dataclass(frozen=True, slots=True)
class Shape:
    """A statement that can run once for many rows.

    table: its name as written, to be resolved by PostgreSQL. parameters: how many it has. keys: the columns by which an
    UPDATE finds its rows, with the parameter (from 0) that each is compared with; empty for an INSERT. assigned: the columns
    that an UPDATE changes; None for an INSERT. added: the columns that a parameter is added to or subtracted from, with that
    parameter, of an UPDATE that does no more with its parameters and rows than that and the keys; else empty.
    """

    table: str
    parameters: int
    keys: tuple[tuple[str, int], ...]
    assigned: tuple[str, ...] | None
    added: tuple[tuple[str, int], ...]
    _before: str
    _expressions: str
    _after: str

    def text(self, types: Sequence[str]) -> str:
        """The statement for arrays of these types, one for each parameter: names of `TYPES` only."""
        if len(types) != self.parameters or not TYPES.issuperset(types):
            raise ValueError(f"types {types} for {self.parameters} parameters")
        arrays = ", ".join(f"${n}::pg_catalog.{name}[]" for n, name in enumerate(types, 1))
        names = ", ".join(f"consumer_c{n}" for n in range(1, self.parameters + 1))
        rows = f"from unnest({arrays}) as consumer_r({names})"
        return f"{self._before} {self._expressions} {rows} {self._after}"


def shape_of(sql: str) -> Shape | None:
    """The shape of a statement, or None for one that must run as it is, once for each row."""
    tokens = _tokens(sql)
    if tokens is None or len(tokens) < 6:
        return None
    try:
        match tokens[0].text, tokens[1].text:
            case "insert", "into":
                return _insert(_Reader(tokens, 2))
            case "update", _:
                return _update(_Reader(tokens, 1))
    except _Other:
        pass
    return None


def rounds(arguments: Sequence[Sequence[Any]], shape: Shape) -> list[Sequence[Sequence[Any]]] | None:
    """The rows of each run of the statement, or None when their values do not fit it.

    An UPDATE that met one row twice would change it once only. So the first use of each key is in the first round, the second
    in the second: one key's writes keep their order. A round is sorted by key, so that two transactions lock rows in one order.
    """
    if any(len(each) != shape.parameters for each in arguments):
        return None
    for column in range(shape.parameters):
        kinds = set(map(type, map(itemgetter(column), arguments)))
        if kinds & _CONTAINERS or any(kind.__module__ not in _PLAIN_MODULES for kind in kinds):
            return None
        if kinds & _SIZED and sum(len(each[column]) for each in arguments if type(each[column]) in _SIZED) > _BYTES_MAX:
            return None
    if not shape.keys:
        return [arguments]
    places = [place for _, place in shape.keys]
    for place in places:
        kinds = set(map(type, map(itemgetter(place), arguments)))
        if len(kinds) != 1 or not kinds <= _KEYS:
            return None
    key = itemgetter(*places)
    found: list[list[Sequence[Any]]] = []
    times: dict[Any, int] = {}
    for each in arguments:
        value = key(each)
        time = times.get(value, 0)
        times[value] = time + 1
        if time == len(found):
            found.append([])
        found[time].append(each)
    for each_round in found:
        each_round.sort(key=key)
    return list(found)


_SIZED = frozenset({str, bytes})


def sums(
    arguments: Sequence[Sequence[Any]], shape: Shape, most: Sequence[int]
) -> tuple[list[Sequence[Any]], list[Sequence[Any]]] | None:
    """One row for each key with the sums of what is added to it, and the arguments that must run one by one all the same.

    None when the values do not fit. most: for each of `shape.added`, the largest number that its parameter can hold. A key to
    which numbers of both signs are added is not summed: on the way, its column may leave its type's range, which is an error
    of one message. With one sign, it does so at the end if ever.
    """
    places = [place for _, place in shape.added]
    if any(len(each) != shape.parameters for each in arguments):
        return None
    for place in places:
        if set(map(type, map(itemgetter(place), arguments))) != {int}:
            return None
    key_places = [place for _, place in shape.keys]
    for place in key_places:
        kinds = set(map(type, map(itemgetter(place), arguments)))
        if len(kinds) != 1 or not kinds <= _KEYS:
            return None
    key = itemgetter(*key_places)
    keys = list(map(key, arguments))
    rows: dict[Any, list[Any]] = {}
    mixed: set[Any] = set()
    for number, (place, limit) in enumerate(zip(places, most, strict=True)):
        added = list(map(itemgetter(place), arguments))
        total: dict[Any, int] = {}
        for each, value in zip(keys, added, strict=True):
            total[each] = total.get(each, 0) + value
        if max(total.values()) > limit or min(total.values()) < -limit:
            return None
        if min(added) < 0 < max(added):
            mixed |= {each for each, value in zip(keys, added, strict=True) if value > 0} & {
                each for each, value in zip(keys, added, strict=True) if value < 0
            }
        if number == 0:
            for each, first in zip(reversed(keys), reversed(arguments), strict=True):
                rows[each] = list(first)
        for each, value in total.items():
            rows[each][place] = value
    alone = [each for each, name in zip(arguments, keys, strict=True) if name in mixed] if mixed else []
    return [rows[each] for each in sorted(rows) if each not in mixed], alone


class _Other(Exception):
    """Not a shape that is known."""


def _tokens(sql: str) -> list[Token] | None:
    if "--" in sql or "/*" in sql:
        return None
    found: list[Token] = []
    position = 0
    while position < len(sql):
        match = _TOKEN.match(sql, position)
        if match is None:
            return None
        position = match.end()
        if match.lastgroup is not None:
            text = match[0].lower() if match.lastgroup == "word" else match[0]
            found.append(Token(match.lastgroup, text))
    return found


class _Reader:
    def __init__(self, tokens: Sequence[Token], position: int) -> None:
        self._tokens = tokens
        self._position = position
        self.parameters: set[int] = set()

    @property
    def next(self) -> Token:
        return self._tokens[self._position] if self._position < len(self._tokens) else Token("end", "")

    def take(self, *texts: str) -> Token:
        """The next token, which must be one of these."""
        token = self.next
        if texts and token.text not in texts:
            raise _Other
        self._position += 1
        return token

    def takes(self, *texts: str) -> bool:
        """Whether these come next; if so they are passed."""
        following = [each.text for each in self._tokens[self._position : self._position + len(texts)]]
        if following != list(texts):
            return False
        self._position += len(texts)
        return True

    def name(self) -> str:
        token = self.take()
        if token.kind not in ("word", "quoted") or token.text in _REFUSED:
            raise _Other
        return token.text

    def dotted(self) -> str:
        name = self.name()
        while self.takes("."):
            name += f".{self.name()}"
        return name

    def names(self) -> str:
        self.take("(")
        found = [self.name()]
        while self.takes(","):
            found.append(self.name())
        self.take(")")
        return f"({', '.join(found)})"

    def expression(self, *ends: str, columns: bool) -> list[Token]:
        """Tokens up to one of `ends` outside parentheses, parameters replaced. columns: whether a row's own may be used."""
        found: list[Token] = []
        depth = 0
        while depth or self.next.text not in ends:
            token = self.take()
            match token.kind:
                case "end":
                    raise _Other
                case "word" if token.text in _REFUSED:
                    raise _Other
                case "word" | "quoted" if self.next.text == "(":
                    if token.kind == "quoted" or (
                        token.text not in _FUNCTIONS and token.text not in ("and", "or", "not")
                    ):
                        raise _Other
                case "word" | "quoted" if not columns and token.text not in ("null", "true", "false"):
                    if token.text not in TYPES or not found or found[-1].text != "::":
                        raise _Other
                case "parameter":
                    number = int(token.text[1:])
                    self.parameters.add(number)
                    token = Token("parameter", f"consumer_r.consumer_c{number}")
            depth += (token.text == "(") - (token.text == ")")
            if depth < 0:
                raise _Other
            found.append(token)
        if not found:
            raise _Other
        return found

    def count(self) -> int:
        """How many parameters there are. They must be used without a gap."""
        if not self.parameters or self.parameters != set(range(1, len(self.parameters) + 1)):
            raise _Other
        return len(self.parameters)


def _join(tokens: Sequence[Token]) -> str:
    return " ".join(each.text for each in tokens)


def _insert(reader: _Reader) -> Shape:
    table = reader.dotted()
    columns = reader.names() if reader.next.text == "(" else ""
    reader.take("values")
    reader.take("(")
    values = [_join(reader.expression(",", ")", columns=False))]
    while reader.takes(","):
        values.append(_join(reader.expression(",", ")", columns=False)))
    reader.take(")")
    after = ""
    if reader.takes("on", "conflict"):
        target = ""
        if reader.next.text == "(":
            target = reader.names()
        elif reader.takes("on", "constraint"):
            target = f"on constraint {reader.name()}"
        reader.take("do")
        reader.take("nothing")
        after = f"on conflict {target} do nothing"
    if reader.take().kind != "end":
        raise _Other
    return Shape(table, reader.count(), (), None, (), f"insert into {table} {columns} select", ", ".join(values), after)


def _update(reader: _Reader) -> Shape:
    table = reader.dotted()
    alias = ""
    if reader.takes("as") or reader.next.text != "set":
        alias = reader.name()
    reader.take("set")
    owner = _plain(alias or table.rpartition(".")[2])
    assigned: dict[str, list[Token]] = {}
    changes: list[str] = []
    while True:
        column = reader.name()
        reader.take("=")
        assigned[_plain(column)] = change = reader.expression(",", "where", columns=True)
        changes.append(f"{column} = {_join(change)}")
        if not reader.takes(","):
            break
    reader.take("where")
    where = reader.expression("", columns=True)
    terms = _terms(where)
    keys = tuple(
        (column, number - 1)
        for column, number in _equalities(terms, owner)
        if column not in assigned  # else a row that was changed may be found again under its new value
    )
    if not keys:
        raise _Other
    added = _added(assigned, owner)
    numbers = [place for _, place in (*keys, *added)]
    if (
        len(keys) != len(terms)
        or sorted(numbers) != list(range(reader.count()))
        or not _is_same_for_all(assigned, added)
    ):
        added = ()
    named = f"{table} as {alias}" if alias else table
    return Shape(
        table,
        reader.count(),
        keys,
        tuple(sorted(assigned)),
        added,
        f"update {named} set",
        ", ".join(changes),
        f"where {_join(where)}",
    )


def _plain(name: str) -> str:
    """A name as the catalog holds it."""
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _terms(where: Sequence[Token]) -> list[list[Token]]:
    """The terms of a condition that nothing but AND holds together; none when something else does."""
    terms: list[list[Token]] = [[]]
    depth = 0
    for token in where:
        depth += (token.text == "(") - (token.text == ")")
        if not depth and token.kind == "word" and token.text == "or":
            return []
        if not depth and token.kind == "word" and token.text == "and":
            terms.append([])
        else:
            terms[-1].append(token)
    return terms


def _equalities(terms: Sequence[Sequence[Token]], owner: str) -> list[tuple[str, int]]:
    """Columns that must equal a parameter."""
    found: list[tuple[str, int]] = []
    for term in terms:
        texts = [each.text for each in term]
        if texts.count("=") != 1:
            continue
        at = texts.index("=")
        sides = [term[:at], term[at + 1 :]]
        if len(sides[0]) == 1 and sides[0][0].kind == "parameter":
            sides.reverse()
        column, parameter = _column(sides[0], owner), sides[1]
        if column is not None and len(parameter) == 1 and parameter[0].kind == "parameter":
            found.append((column, _number(parameter[0])))
    return found


def _added(assigned: Mapping[str, Sequence[Token]], owner: str) -> tuple[tuple[str, int], ...]:
    """Columns that become themselves plus or minus a parameter, with its place."""
    found: list[tuple[str, int]] = []
    for column, change in assigned.items():
        *left, sign, last = change if len(change) > 2 else [*change, *change, *change]
        if sign.text in ("+", "-") and last.kind == "parameter" and _column(left, owner) == column:
            found.append((column, _number(last) - 1))
        elif (
            change[0].kind == "parameter"
            and change[1:2]
            and change[1].text == "+"
            and _column(change[2:], owner) == column
        ):
            found.append((column, _number(change[0]) - 1))
    return tuple(found)


def _is_same_for_all(assigned: Mapping[str, Sequence[Token]], added: Sequence[tuple[str, int]]) -> bool:
    """Whether the other columns become one and the same, whichever of a row's executions is the last."""
    columns = {column for column, _ in added}
    return all(
        token.kind in ("number", "text") or token.text in ("now", "(", ")", "null", "true", "false")
        for column, change in assigned.items()
        if column not in columns
        for token in change
    )


def _column(tokens: Sequence[Token], owner: str) -> str | None:
    """The column that these tokens name, and do no more."""
    if len(tokens) == 3 and _plain(tokens[0].text) == owner and tokens[1].text == ".":
        tokens = tokens[2:]
    return _plain(tokens[0].text) if len(tokens) == 1 and tokens[0].kind in ("word", "quoted") else None


def _number(parameter: Token) -> int:
    return int(parameter.text.removeprefix("consumer_r.consumer_c"))
