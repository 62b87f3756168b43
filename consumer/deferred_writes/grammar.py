"""The grammar of deferred writes that is understood, and how one of them reads for many rows.

`insert into t values ($1, $2)` a thousand times is `insert into t select c1, c2 from unnest($1, $2)` once; an UPDATE or an
upsert likewise, in rounds that meet no row twice (deferred_writes/rounds.py), and a DELETE by key.
A few forms are read, each of them completely: every word is a keyword, a function or a type of the lists below, or a column.
Everything else is refused. Knows SQL texts; knows no connection and no table: deferred_writes/catalog.py decides about those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Depend on their arguments and the transaction only, and read no table.
FUNCTIONS = frozenset(
    {
        *("now", "gen_random_uuid", "abs", "lower", "upper", "round", "floor", "ceil", "length", "date_trunc"),
        *("md5", "to_timestamp"),
    }
)
_FUNCTION_KEYWORDS = frozenset({"coalesce", "greatest", "least", "nullif"})  # nobody can define another of these
_KEYWORDS = frozenset(
    {
        *("null", "true", "false", "current_timestamp", "current_date", "localtimestamp"),
        *("current_user", "session_user"),
    }
)
_JOINING = frozenset({"and", "or", "not", "is"})
# Words that make an expression more than one row's arithmetic, or mean something else in a SELECT than in VALUES.
_REFUSED = frozenset(
    {
        *("select", "with", "default", "returning", "from", "only", "case", "exists", "any", "all", "some", "array"),
        *("row", "in", "between", "like", "ilike", "similar", "collate", "over", "current", "overriding", "table"),
        *("tablesample", "using", "where", "values", "set", "on"),
    }
)
_TOKEN = re.compile(
    r"""[\ \t\n\r\f]+
    | (?P<parameter>\$[1-9][0-9]{0,4}(?![0-9A-Za-z_]))
    | (?P<number>[0-9]+(?:\.[0-9]+)?(?![0-9A-Za-z_.]))
    | (?P<text>'(?:[^'\\]|'')*'(?!\s*[\n\r]?\s*'))
    | (?P<quoted>"(?:[^"\\]|"")+")
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)(?!['"$\x80-\U0010ffff])
    | (?P<sign>::|[(),.]|[-+*/%=<>!|]+)
    """,
    re.VERBOSE,
)
SIGNS = frozenset({"||", "<>", "<=", ">=", "!=", "->", "->>", "-", "+", "*", "/", "%", "=", "<", ">"})
# Scalars whose arrays the driver encodes from plain Python values, and that PostgreSQL's unnest gives back unchanged.
TYPES = frozenset(
    {
        *("int2", "int4", "int8", "float4", "float8", "numeric", "bool", "uuid"),
        *("text", "varchar", "bytea", "date", "timestamp", "timestamptz", "json", "jsonb"),
    }
)
_CASTS = TYPES | {"int", "integer", "bigint", "smallint", "boolean", "decimal", "real", "interval"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str  # words in lower case, quoted names and all else as written


@dataclass(frozen=True, slots=True)
class Shape:
    """A statement that is understood.

    kind: "insert", "upsert", "update" or "delete". table: its name as written, to be resolved by PostgreSQL.
    keys: the columns by which rows are found, with the parameter (from 0) that each is compared with: of an UPDATE or a
    DELETE those of its WHERE, of an upsert the one that conflicts; empty for an INSERT. assigned: the columns that an UPDATE
    or an upsert changes. added: the columns that a parameter is added to or subtracted from, with that parameter, of an
    UPDATE that does no more with its parameters and rows than that and the keys; else empty. inserted: of an INSERT, each
    value's parameter, None for another expression. columns: those that an INSERT lists. names: the columns that expressions
    mention. functions: those of FUNCTIONS that they call. borrowed: columns of an upsert whose new value stands for its
    parameter in the form for many rows. has_rows: whether there is a form for many rows at all.
    """

    kind: str
    table: str
    parameters: int
    keys: tuple[tuple[str, int], ...] = ()
    assigned: tuple[str, ...] = ()
    added: tuple[tuple[str, int], ...] = ()
    inserted: tuple[int | None, ...] = ()
    columns: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    borrowed: tuple[tuple[str, int], ...] = ()
    has_rows: bool = True
    _before: str = ""
    _expressions: str = ""
    _after: str = ""

    def text(self, types: Sequence[str]) -> str:
        """The statement for arrays of these types, one for each parameter: names of `TYPES` only."""
        if len(types) != self.parameters or not TYPES.issuperset(types):
            raise ValueError(f"types {types} for {self.parameters} parameters")
        arrays = ", ".join(f"${n}::pg_catalog.{name}[]" for n, name in enumerate(types, 1))
        names = ", ".join(f"consumer_c{n}" for n in range(1, self.parameters + 1))
        joined = "using" if self.kind == "delete" else "from"
        rows = f"{joined} unnest({arrays}) as consumer_r({names})"
        return f"{self._before} {self._expressions} {rows} {self._after}"


def shape_of(sql: str) -> Shape | None:
    """The shape of a statement, or None for one that must run as it is, in its place."""
    tokens = _tokens(sql)
    if tokens is None or len(tokens) < 6:
        return None
    try:
        match tokens[0].text, tokens[1].text:
            case "insert", "into":
                return _insert(_Reader(tokens, 2))
            case "update", _:
                return _update(_Reader(tokens, 1))
            case "delete", "from":
                return _delete(_Reader(tokens, 2))
    except _Other:
        pass
    return None


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
        kind, text = match.lastgroup, match[0]
        if kind == "sign" and text not in ("::", "(", ")", ",", "."):
            # PostgreSQL takes all signs together for one operator. But a last + or - is a number's, without a % ! or | before.
            while len(text) > 1 and text not in SIGNS and text[-1] in "+-" and not re.search("[%!|]", text):
                text, position = text[:-1], position - 1
            if text not in SIGNS:
                return None
        if kind is not None:
            found.append(Token(kind, text.lower() if kind == "word" else text))
    return found


class _Reader:
    def __init__(self, tokens: Sequence[Token], position: int) -> None:
        self._tokens = tokens
        self._position = position
        self.parameters: set[int] = set()
        self.columns: set[str] = set()
        self.functions: set[str] = set()

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

    def names(self) -> list[str]:
        self.take("(")
        found = [self.name()]
        while self.takes(","):
            found.append(self.name())
        self.take(")")
        return found

    def expression(self, *ends: str, owners: Sequence[str]) -> list[Token]:
        """Tokens up to one of `ends` outside parentheses, parameters replaced.

        owners: what columns may be qualified with; none where an expression may not use columns.
        """
        found: list[Token] = []
        depth = 0
        while depth or self.next.text not in ends:
            token = self.take()
            match token.kind:
                case "end":
                    raise _Other
                case "word" | "quoted":
                    self._word(token, found[-1].text if found else "", owners)
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

    def _word(self, token: Token, before: str, owners: Sequence[str]) -> None:
        """Note what a word of an expression names. Raises _Other for one that is not known."""
        text, after = token.text, self.next
        if token.kind == "word" and text in _REFUSED:
            raise _Other
        if token.kind == "word" and before not in (".", "::") and (text in _JOINING or text in _KEYWORDS):
            return
        if before == "::" or (token.kind == "word" and after.kind == "text"):  # a type
            if token.kind != "word" or text not in _CASTS:
                raise _Other
        elif after.text == "(":
            if token.kind != "word" or before == "." or text not in FUNCTIONS | _FUNCTION_KEYWORDS:
                raise _Other
            if text in FUNCTIONS:
                self.functions.add(text)
        elif after.text == ".":
            if before == "." or _plain(text) not in owners:
                raise _Other
        elif owners:
            self.columns.add(_plain(text))
        else:
            raise _Other

    def count(self) -> int:
        """How many parameters there are. They must be used without a gap."""
        if not self.parameters or self.parameters != set(range(1, len(self.parameters) + 1)):
            raise _Other
        return len(self.parameters)


def _join(tokens: Sequence[Token]) -> str:
    return " ".join(each.text for each in tokens)


def _insert(reader: _Reader) -> Shape:
    table = reader.dotted()
    alias = reader.name() if reader.takes("as") else ""
    columns = reader.names() if reader.next.text == "(" else []
    reader.take("values")
    reader.take("(")
    values = [reader.expression(",", ")", owners=())]
    while reader.takes(","):
        values.append(reader.expression(",", ")", owners=()))
    reader.take(")")
    inserted = [_number(each[0]) if len(each) == 1 and each[0].kind == "parameter" else None for each in values]
    named = f"{table} as {alias}" if alias else table
    listed = f"({', '.join(columns)})" if columns else ""
    shape = Shape(
        kind="insert",
        table=table,
        parameters=0,
        inserted=tuple(None if each is None else each - 1 for each in inserted),
        columns=tuple(map(_plain, columns)),
        _before=f"insert into {named} {listed} select",
        _expressions=", ".join(map(_join, values)),
    )
    if reader.takes("on", "conflict"):
        target: list[str] = []
        text = ""
        if reader.next.text == "(":
            target = reader.names()
            text = f"({', '.join(target)})"
        elif reader.takes("on", "constraint"):
            text = f"on constraint {reader.name()}"
        reader.take("do")
        if reader.takes("update"):
            shape = _upsert(reader, shape, target, alias)
        else:
            reader.take("nothing")
            shape = replace(shape, _after=f"on conflict {text} do nothing")
    if reader.take().kind != "end":
        raise _Other
    return replace(
        shape, parameters=reader.count(), names=frozenset(reader.columns), functions=frozenset(reader.functions)
    )


def _upsert(reader: _Reader, shape: Shape, target: Sequence[str], alias: str) -> Shape:
    """An INSERT … ON CONFLICT (column) DO UPDATE, from its SET on."""
    if len(target) != 1 or not shape.columns:
        raise _Other
    place = dict(zip(shape.columns, shape.inserted, strict=False)).get(_plain(target[0]))
    owner = _plain(alias or shape.table.rpartition(".")[2])
    reader.take("set")
    assigned = _assignments(reader, (owner, "excluded"))
    where = reader.expression("", owners=(owner, "excluded")) if reader.takes("where") else []
    if place is None or _plain(target[0]) in map(_plain, assigned):
        raise _Other  # the row that it meets could not be told from its arguments
    # Here only the row that was to be inserted can be named: a parameter is read from the column that it was put into.
    source = {
        number: column for column, number in zip(shape.columns, shape.inserted, strict=True) if number is not None
    }
    borrowed: dict[str, int] = {}
    has_rows = True
    for token in [each for tokens in (*assigned.values(), where) for each in tokens if each.kind == "parameter"]:
        column = source.get(_number(token) - 1)
        if column is None:
            has_rows = False
        else:
            borrowed[column] = _number(token) - 1

    def read(tokens: Sequence[Token]) -> str:
        quoted = {number: 'excluded."' + name.replace('"', '""') + '"' for number, name in source.items()}
        return " ".join(quoted.get(_number(each) - 1, "") if each.kind == "parameter" else each.text for each in tokens)

    changes = ", ".join(f"{column} = {read(change)}" for column, change in assigned.items())
    condition = f" where {read(where)}" if where else ""
    return replace(
        shape,
        kind="upsert",
        keys=((_plain(target[0]), place),),
        assigned=tuple(sorted(map(_plain, assigned))),
        borrowed=tuple(borrowed.items()),
        has_rows=has_rows,
        _after=f"on conflict ({target[0]}) do update set {changes}{condition}",
    )


def _assignments(reader: _Reader, owners: Sequence[str]) -> dict[str, list[Token]]:
    """Columns as written, each with what it becomes."""
    assigned: dict[str, list[Token]] = {}
    while True:
        column = reader.name()
        if _plain(column) in map(_plain, assigned):
            raise _Other
        reader.take("=")
        assigned[column] = reader.expression(",", "where", "", owners=owners)
        if not reader.takes(","):
            return assigned


def _update(reader: _Reader) -> Shape:
    table = reader.dotted()
    alias = ""
    if reader.takes("as") or reader.next.text != "set":
        alias = reader.name()
    reader.take("set")
    owner = _plain(alias or table.rpartition(".")[2])
    written = _assignments(reader, (owner,))
    assigned = {_plain(column): change for column, change in written.items()}
    changes = ", ".join(f"{column} = {_join(change)}" for column, change in written.items())
    reader.take("where")
    where = reader.expression("", owners=(owner,))
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
        kind="update",
        table=table,
        parameters=reader.count(),
        keys=keys,
        assigned=tuple(sorted(assigned)),
        added=added,
        names=frozenset(reader.columns),
        functions=frozenset(reader.functions),
        _before=f"update {named} set",
        _expressions=changes,
        _after=f"where {_join(where)}",
    )


def _delete(reader: _Reader) -> Shape:
    table = reader.dotted()
    alias = ""
    if reader.takes("as") or reader.next.text != "where":
        alias = reader.name()
    owner = _plain(alias or table.rpartition(".")[2])
    reader.take("where")
    where = reader.expression("", owners=(owner,))
    keys = tuple((column, number - 1) for column, number in _equalities(_terms(where), owner))
    if not keys:
        raise _Other
    named = f"{table} as {alias}" if alias else table
    return Shape(
        kind="delete",
        table=table,
        parameters=reader.count(),
        keys=keys,
        names=frozenset(reader.columns),
        functions=frozenset(reader.functions),
        _before=f"delete from {named}",  # noqa: S608 - a token of the statement itself
        _after=f"where {_join(where)}",
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
