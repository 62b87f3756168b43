"""The grammar of deferred writes that is understood.

A few forms of INSERT, UPDATE and DELETE are read, each of them completely; everything else is refused and runs as it
is, in its place. Limitations: sees no table; deferred_writes/catalog.py judges the shape by the table behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from consumer.deferred_writes.statement_reader import NotUnderstood, StatementReader, Token, plain_name, tokenize
from consumer.deferred_writes.statement_shape import Shape


def shape_of(sql: str) -> Shape | None:
    """Return a statement's shape; None if it must run as it is."""
    tokens = tokenize(sql)
    if tokens is None or len(tokens) < 6:
        return None
    try:
        match tokens[0].text, tokens[1].text:
            case "insert", "into":
                return _insert(StatementReader(tokens, 2))
            case "update", _:
                return _update(StatementReader(tokens, 1))
            case "delete", "from":
                return _delete(StatementReader(tokens, 2))
            case _:
                return None
    except NotUnderstood:
        return None


def _join(tokens: Sequence[Token]) -> str:
    return " ".join(token.text for token in tokens)


def _insert(reader: StatementReader) -> Shape:
    table = reader.dotted()
    alias = reader.name() if reader.takes("as") else ""
    columns = reader.names() if reader.next.text == "(" else []
    reader.take("values")
    reader.take("(")
    values = [reader.expression(",", ")", owners=())]
    while reader.takes(","):
        values.append(reader.expression(",", ")", owners=()))
    reader.take(")")
    inserted = [_number(tokens[0]) if len(tokens) == 1 and tokens[0].kind == "parameter" else None for tokens in values]
    named = f"{table} as {alias}" if alias else table
    listed = f"({', '.join(columns)})" if columns else ""
    shape = Shape(
        kind="insert",
        table=table,
        parameters=0,
        inserted=tuple(None if number is None else number - 1 for number in inserted),
        columns=tuple(map(plain_name, columns)),
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
        raise NotUnderstood
    return replace(
        shape, parameters=reader.count(), names=frozenset(reader.columns), functions=frozenset(reader.functions)
    )


def _upsert(reader: StatementReader, shape: Shape, target: Sequence[str], alias: str) -> Shape:
    """An INSERT … ON CONFLICT (column) DO UPDATE, from its SET on."""
    if len(target) != 1 or not shape.columns:
        raise NotUnderstood
    place = dict(zip(shape.columns, shape.inserted, strict=False)).get(plain_name(target[0]))
    owner = plain_name(alias or shape.table.rpartition(".")[2])
    reader.take("set")
    assigned = _assignments(reader, (owner, "excluded"))
    where = reader.expression("", owners=(owner, "excluded")) if reader.takes("where") else []
    if place is None or plain_name(target[0]) in map(plain_name, assigned):
        raise NotUnderstood  # the row that it meets could not be known from its arguments
    # Here only the row that was to be inserted can be named: a parameter is read from the column that it was put into.
    source = {
        number: column for column, number in zip(shape.columns, shape.inserted, strict=True) if number is not None
    }
    borrowed: dict[str, int] = {}
    has_rows = True
    for token in [token for tokens in (*assigned.values(), where) for token in tokens if token.kind == "parameter"]:
        column = source.get(_number(token) - 1)
        if column is None:
            has_rows = False
        else:
            borrowed[column] = _number(token) - 1

    def read(tokens: Sequence[Token]) -> str:
        quoted = {number: 'excluded."' + name.replace('"', '""') + '"' for number, name in source.items()}
        return " ".join(
            quoted.get(_number(token) - 1, "") if token.kind == "parameter" else token.text for token in tokens
        )

    changes = ", ".join(f"{column} = {read(change)}" for column, change in assigned.items())
    condition = f" where {read(where)}" if where else ""
    return replace(
        shape,
        kind="upsert",
        keys=((plain_name(target[0]), place),),
        assigned=tuple(sorted(map(plain_name, assigned))),
        borrowed=tuple(borrowed.items()),
        has_rows=has_rows,
        _after=f"on conflict ({target[0]}) do update set {changes}{condition}",
    )


def _assignments(reader: StatementReader, owners: Sequence[str]) -> dict[str, list[Token]]:
    """Columns as written, each with what it becomes."""
    assigned: dict[str, list[Token]] = {}
    while True:
        column = reader.name()
        if plain_name(column) in map(plain_name, assigned):
            raise NotUnderstood
        reader.take("=")
        assigned[column] = reader.expression(",", "where", "", owners=owners)
        if not reader.takes(","):
            return assigned


def _update(reader: StatementReader) -> Shape:
    table = reader.dotted()
    alias = ""
    if reader.takes("as") or reader.next.text != "set":
        alias = reader.name()
    reader.take("set")
    owner = plain_name(alias or table.rpartition(".")[2])
    written = _assignments(reader, (owner,))
    assigned = {plain_name(column): change for column, change in written.items()}
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
        raise NotUnderstood
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


def _delete(reader: StatementReader) -> Shape:
    table = reader.dotted()
    alias = ""
    if reader.takes("as") or reader.next.text != "where":
        alias = reader.name()
    owner = plain_name(alias or table.rpartition(".")[2])
    reader.take("where")
    where = reader.expression("", owners=(owner,))
    keys = tuple((column, number - 1) for column, number in _equalities(_terms(where), owner))
    if not keys:
        raise NotUnderstood
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


def _terms(where: Sequence[Token]) -> list[list[Token]]:
    """Return the terms of a condition joined by AND only, else none."""
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
    equalities: list[tuple[str, int]] = []
    for term in terms:
        texts = [token.text for token in term]
        if texts.count("=") != 1:
            continue
        at = texts.index("=")
        sides = [term[:at], term[at + 1 :]]
        if len(sides[0]) == 1 and sides[0][0].kind == "parameter":
            sides.reverse()
        column, parameter = _column(sides[0], owner), sides[1]
        if column is not None and len(parameter) == 1 and parameter[0].kind == "parameter":
            equalities.append((column, _number(parameter[0])))
    return equalities


def _added(assigned: Mapping[str, Sequence[Token]], owner: str) -> tuple[tuple[str, int], ...]:
    """Columns that become themselves plus or minus a parameter, with its place."""
    added: list[tuple[str, int]] = []
    for column, change in assigned.items():
        if change[0].text == "(" and change[-1].text == ")" and not {"(", ")"} & {token.text for token in change[1:-1]}:
            change = change[1:-1]  # as an ORM writes it
        *left, sign, last = change if len(change) > 2 else [*change, *change, *change]
        if sign.text in ("+", "-") and last.kind == "parameter" and _column(left, owner) == column:
            added.append((column, _number(last) - 1))
        elif (
            change[0].kind == "parameter"
            and change[1:2]
            and change[1].text == "+"
            and _column(change[2:], owner) == column
        ):
            added.append((column, _number(change[0]) - 1))
    return tuple(added)


def _is_same_for_all(assigned: Mapping[str, Sequence[Token]], added: Sequence[tuple[str, int]]) -> bool:
    """Whether the other columns end the same, whichever execution is last."""
    columns = {column for column, _ in added}
    return all(
        token.kind in ("number", "text") or token.text in ("now", "(", ")", "null", "true", "false")
        for column, change in assigned.items()
        if column not in columns
        for token in change
    )


def _column(tokens: Sequence[Token], owner: str) -> str | None:
    """The column that these tokens name, and do no more."""
    if len(tokens) == 3 and plain_name(tokens[0].text) == owner and tokens[1].text == ".":
        tokens = tokens[2:]
    return plain_name(tokens[0].text) if len(tokens) == 1 and tokens[0].kind in ("word", "quoted") else None


def _number(parameter: Token) -> int:
    return int(parameter.text.removeprefix("consumer_r.consumer_c"))
