"""SQL is built only from quoted names, numbers and reviewed values.

Reads the source. A value is known to be good when it is a call of one of CHECKED, a number, a constant, or a variable that
is only ever assigned such. Other values are listed in REVIEWED, with the reason why no caller can choose them.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_trees import nodes_of

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).resolve().parent.parent.parent / "consumer"

# They check a name (or a text), and quote it.
CHECKED = {"ident", "table_ident", "literal", "savepoint_name"}
# They cannot return anything but a number.
NUMBERS = {"len", "int", "range", "enumerate"}

# Built from names that were checked where they came from, or from PostgreSQL's own catalog, which quotes what it hands out.
_BY_TABLE_MODEL = (
    "built from ident() and PostgreSQL's own expressions by rebuild/table_model.py and the modules beside it"
)
REVIEWED: dict[str, dict[str, str]] = {
    "rebuild/absent_rows.py": {"table.name.copy": _BY_TABLE_MODEL},
    "rebuild/shadow_tables.py": {
        "table.name.copy": _BY_TABLE_MODEL,
        "by_oid[child].name.copy": _BY_TABLE_MODEL,
        "definition": "pg_get_constraintdef",
        "filling.as_it_is": _BY_TABLE_MODEL,
        "counter": _BY_TABLE_MODEL,
        "copy": _BY_TABLE_MODEL,
    },
    "postgres/applied_queries.py": {"table": _BY_TABLE_MODEL},
    "deferred_writes/grammar.py": {
        "listed": "tokens of the handler's own statement",
        "named": "a token of the handler's own statement",
    },
    "postgres/grants.py": {
        "', '.join(rights)": "the table in that file",
        "table": "the table in that file",
        "function": "the functions in that file",
    },
    "rebuild/drawn_values.py": {
        expression: _BY_TABLE_MODEL for expression in ("table.name.real", "table.name.copy", "fits")
    },
    "rebuild/copy_sql.py": {
        expression: _BY_TABLE_MODEL
        for expression in ["copy", "default", "number", "start", "table.name.copy", "table.name.real"]
    },
    "rebuild/trace_sql.py": {"copy": _BY_TABLE_MODEL, "name": "a number of this run"},
    "rebuild/compare_sql.py": {
        expression: _BY_TABLE_MODEL
        for expression in [
            "', '.join([*taken, f'{real} as real', f'{1 - real} as rebuilt'])",
            "', '.join(key_values)",
            "_array((f'(r.{ident(name)}::numeric - b.{ident(name)}::numeric)::text' for name in self.numeric))",
            "_array((f'left(b.{name}::text, {SHOWN_MAX + 1})' for name in names))",
            "_array((f'left(r.{name}::text, {SHOWN_MAX + 1})' for name in names))",
            "_array((f'left({value}::text, {SHOWN_MAX + 1})' for value in key_values))",
            "_array((self._column_differs(column) for column in self.shown), 'bool')",
            "columns_sql",
            "columns_sql or 'null'",
            "both",
            "differing",
            "group",
            "place",
            "plain",
            "row_mark((f'c{n}' for n in range(len(self.columns))))",
            "row_mark(key_values)",
            "row_mark(shown)",
            "row_mark(keys)",
            "self._row_counts()",
            "self._row_differs()",
            "self._joined()",
            "self.table.name.copy",
            "shown",
        ]
    },
    "postgres/claim_sql.py": {"_RELEASE_CLAIMS.format(target='consumer.turning')": "a constant of that file"},
    "postgres/session.py": {
        "name": "of session_settings in connection.py",
        "value": "of session_settings: numbers and words of connection.py",
        "local": "of the same",
        "self.server.stamp_sql": "constants of postgres/server.py",
    },
    "postgres/dead_letter_queries.py": {"SETTLES": "a constant of postgres/dead_letters.py"},
    "postgres/migrate.py": {
        "migration.version": "of our own files' names",
        "migration.name": "of our own files' names",
        "migration.checksum": "hexadecimal",
    },
    "schemes/states.py": {
        "plain": "format_type",
        "named": "ident(), when the machine is made",
        "column": "ident(), when the machine is made",
        "constraint['expression']": "pg_get_expr",
    },
    "postgres/server.py": {
        "', '.join(parts.values())": "constants of that file",
        "stamp_sql": "constants of that file",
        "expression": "constants of that file",
    },
    "testing/outside_rows.py": {"name": "PostgreSQL's format('%I.%I')"},
    "testing/server.py": {
        "name": "numbers of this run",
        "database": "numbers of this run",
        "rest": "a constant of that file",
    },
}

_VERBS = (
    r"select|insert\s+into|update|delete\s+from|create|drop|alter|truncate|grant|revoke|set\s+(local|session)|savepoint"
)
_VERBS += r"|rollback|release|begin\s+isolation|copy|lock\s+table|with\s+\w+\s+as|analyze|notify|listen"
_SQL = re.compile(rf"(^|;)\s*({_VERBS})\s", re.IGNORECASE)


class _Source:
    """One file, and what its variables are assigned."""

    def __init__(self, path: Path) -> None:
        self.nodes = nodes_of(path.read_text("utf-8"))
        self.assigned: dict[str, list[ast.expr]] = defaultdict(list)
        for node in self.nodes:
            match node:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._note(target, value)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._note(target, value)
                case ast.AugAssign(target=target, value=value):
                    self._note(target, value)
                case ast.comprehension(target=target, iter=ast.Call(func=ast.Name(id="enumerate"))):
                    assert isinstance(target, ast.Tuple)
                    self._note(target.elts[0], ast.Constant(0))
                case ast.comprehension(target=target, iter=ast.Call(func=ast.Name(id="range"))):
                    self._note(target, ast.Constant(0))

    def _note(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, given in zip(target.elts, value.elts, strict=True):
                self._note(one, given)
        elif isinstance(target, ast.Name | ast.Attribute):
            self.assigned[ast.unparse(target)].append(value)

    def is_good(self, node: ast.expr, seen: frozenset[str] = frozenset()) -> bool:
        match node:
            case ast.Constant():
                return True
            case ast.FormattedValue(format_spec=ast.JoinedStr(values=[ast.Constant(value=".0f" | "d" | "08x")])):
                return True  # a number, or an error
            case ast.FormattedValue(value=value):
                return self.is_good(value, seen)
            case ast.JoinedStr(values=values):
                return all(self.is_good(value, seen) for value in values)
            case ast.BinOp(left=left, right=right):
                return self.is_good(left, seen) and self.is_good(right, seen)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in CHECKED | NUMBERS:
                return True
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[argument]):
                return self.is_good(argument, seen)
            case ast.Call(func=ast.Name(id="map"), args=[ast.Name(id=name), *_]):
                return name in CHECKED
            case ast.GeneratorExp(elt=element) | ast.ListComp(elt=element):
                return self.is_good(element, seen)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return all(self.is_good(element, seen) for element in elements)
            case ast.Starred(value=value):
                return self.is_good(value, seen)
            case ast.Name() | ast.Attribute():
                name = ast.unparse(node)
                given = self.assigned.get(name, [])
                return bool(given) and name not in seen and all(self.is_good(value, seen | {name}) for value in given)
        return False

    def statements(self) -> Iterator[tuple[int, list[ast.expr]]]:
        """SQL that is put together, with the expressions in it."""
        for node in self.nodes:
            text, parts = "", list[ast.expr]()
            match node:
                case ast.JoinedStr(values=values):
                    text = "".join(str(value.value) if isinstance(value, ast.Constant) else "?" for value in values)
                    parts = [value for value in values if isinstance(value, ast.FormattedValue)]
                case ast.BinOp(left=ast.Constant(value=str() as text), op=ast.Add() | ast.Mod(), right=right):
                    parts = [right]
                case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="format" | "replace")):
                    parts = [*node.args, *(keyword.value for keyword in node.keywords)]
            if parts and _SQL.search(text):
                assert isinstance(node, ast.expr)
                yield node.lineno, parts


def unchecked(path: Path) -> Iterator[tuple[int, str]]:
    source = _Source(path)
    for line, parts in source.statements():
        for part in parts:
            if not source.is_good(part):
                yield line, ast.unparse(part.value if isinstance(part, ast.FormattedValue) else part)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_values_put_into_sql_are_checked(path: Path) -> None:
    reviewed = REVIEWED.get(str(path.relative_to(PACKAGE)), {})
    unreviewed = [(line, expression) for line, expression in unchecked(path) if expression not in reviewed]
    assert not unreviewed, (
        "quote it with core's ident(), bind it as $1, or write into REVIEWED why no caller can choose it"
    )


def test_the_list_holds_nothing_that_is_gone() -> None:
    for name, reviewed in REVIEWED.items():
        left = set(reviewed) - {expression for _, expression in unchecked(PACKAGE / name)}
        assert not left, f"{name}: take {sorted(left)} from REVIEWED"


def test_scanner_finds_names_put_into_sql(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "def ask(table, n):\n"
        "    good = ident(table)\n"
        "    late = ident(table)\n"
        "    late = table\n"
        "    a = f'select 1 from {good} limit {len(table)}'\n"
        "    b = f'select 1 from {table}'\n"
        "    c = f'SET LOCAL x = 1; delete from {late}'\n"
        "    d = 'insert into ' + table\n"
        "    e = 'drop table {}'.format(table)\n"
        "    f = 'update %s' % table\n"
        "    g = f'no such table: {table}'\n"
    )
    assert list(unchecked(path)) == [(6, "table"), (7, "late"), (8, "table"), (9, "table"), (10, "table")]
