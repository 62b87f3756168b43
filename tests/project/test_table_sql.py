"""Only one file of consumer/postgres/ has a table's SQL.

Reads the string constants of the source. A table belongs to the file that writes it. Other files of the package may
read it in a join, if READ_BY says why; outside the package no SQL names one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_trees import nodes_of, text_of

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).resolve().parent.parent.parent / "consumer"
POSTGRES = PACKAGE / "postgres"

# Tables, by the file that holds their statements.
HOME = {
    "schema_versions": "migrate.py",
    "installation": "server.py",
    "handlers": "handlers.py",
    "topics": "handlers.py",
    "handler_renames": "handlers.py",
    "coverage": "handler_history.py",
    "id_rule_changes": "handler_history.py",
    "handler_code": "handler_history.py",
    "ledger": "claims.py",
    "turning": "claim_sql.py",
    "generations": "generations.py",
    "ledger_state": "generations.py",
    "forgotten": "generations.py",
    "retention": "generations.py",
    "positions": "positions.py",
    "outcomes": "positions.py",
    "shards": "shard_tables.py",
    "route_probes": "shard_tables.py",
    "dead_letters": "dead_letters.py",
    "held": "dead_letters.py",
    "attempts": "dead_letters.py",
    "letters_to_publish": "dead_letter_copies.py",
    "letter_results": "dead_letter_actions.py",
    "audit": "audit.py",
    "pauses": "pauses.py",
    "stopped_partitions": "stopped_partitions.py",
    "waiting": "waiting_messages.py",
    "outbox_streams": "outbox.py",
    "outbox_published": "outbox.py",
    "outbox": "outbox.py",
    "outbox_generations": "outbox.py",
    "outbox_intake": "outbox_intake.py",
    "effects": "effects.py",
}
# Tables that only code of the previous version names.
FORMER = {"letter_actions", "outbox_actions"}
# Numbers of handlers and topics are everywhere: any file of the package may join their names.
NAMES = {"handlers", "topics"}
# Other files that name a table, and why.
ALSO = {
    ("server.py", "schema_versions"): "a connection reads the version before anything else",
    ("handler_history.py", "handlers"): "writes its columns topics and id_rule, which are history",
    ("claim_sql.py", "ledger"): "the text of the statements that claims.py runs",
    ("claim_sql.py", "ledger_state"): "a claim reads the ledger's version in its own statement",
    ("claim_sql.py", "generations"): "names the generations that a claim looks into",
    ("generations.py", "ledger"): "its statistics, by generation",
    ("ledger_queries.py", "ledger"): "reads of commands and checks; claims.py writes",
    ("ledger_queries.py", "dead_letters"): "`consumer show` joins the dead letter of a row",
    ("applied_queries.py", "ledger"): "reads of a rebuild; claims.py writes",
    ("applied_queries.py", "dead_letters"): "a rebuild leaves out what was never applied",
    ("dead_letters.py", "ledger"): "whether a dead letter was applied later",
    ("dead_letter_copies.py", "dead_letters"): "reads what was stored, for the dead-letter topic",
    ("dead_letters.py", "audit"): "whether an operator has edited a dead letter",
    ("dead_letter_actions.py", "dead_letters"): "what operators write; dead_letters.py is what batches write",
    ("dead_letter_actions.py", "held"): "the last dead letter of a chain releases it",
    ("dead_letter_queries.py", "dead_letters"): "reads of commands",
    ("dead_letter_actions.py", "audit"): "an entry and what belongs to it are one statement",
    ("dead_letter_queries.py", "audit"): "reads of commands",
    ("dead_letter_queries.py", "letter_results"): "reads of commands",
    ("message_states.py", "ledger"): "`consumer tail` says of a message what all three tables hold",
    ("message_states.py", "dead_letters"): "`consumer tail`",
    ("message_states.py", "attempts"): "`consumer tail`",
    ("outbox.py", "audit"): "reads of commands: the actions on a stream",
    ("dead_letter_queries.py", "ledger"): "when an edited dead letter was applied",
    ("figures.py", "dead_letters"): "counts for the metrics",
    ("figures.py", "held"): "counts for the metrics",
    ("figures.py", "generations"): "sizes for the metrics",
    ("figures.py", "ledger"): "ages of duplicates, for the metrics",
    ("outgoing_comparison.py", "outbox"): "`replay --outgoing` explains what is not in Kafka",
    ("outgoing_comparison.py", "outbox_published"): "what is published is compared up to the watermarks",
    ("outgoing_comparison.py", "outbox_streams"): "who else publishes to a topic",
    ("outgoing_comparison.py", "audit"): "what an operator discarded or edited is excused",
    ("effects.py", "ledger"): "a result goes when the ledger has forgotten its message",
    ("effects.py", "ledger_state"): "up to when the ledger has forgotten",
    ("handlers.py", "positions"): "an application is known by its handlers or its positions",
}

_SQL = re.compile(r"\b(select|insert|update|delete|truncate|copy|lock)\b", re.IGNORECASE)
_TABLE = re.compile(r"\bconsumer\.([a-z_]+)\b(?!\()")
_BARE = re.compile(r"(\s*(from|join)\s|(only )?consumer\.[a-z_]+$)")
_WRITE = re.compile(
    r"\b(?:insert\s+into|update|delete\s+from|truncate)\s+(?:only\s+)?consumer\.([a-z_]+)", re.IGNORECASE
)


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The string constants of a file, without docstrings."""
    nodes = nodes_of(text_of(path))
    docstrings = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def tables_of(path: Path) -> Iterator[tuple[int, str]]:
    """The tables that SQL in a file names."""
    for line, text in texts_of(path):
        if _SQL.search(text) or _BARE.match(text):
            for name in _TABLE.findall(text):
                if name in HOME:
                    yield line, name


OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if POSTGRES not in path.parents]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sql_outside_the_package_names_no_table(path: Path) -> None:
    assert list(tables_of(path)) == [], "move the statement to the table's file in consumer/postgres/"


@pytest.mark.parametrize("path", sorted(POSTGRES.glob("*.py")), ids=lambda path: path.name)
def test_sql_of_a_table_is_in_its_file(path: Path) -> None:
    elsewhere = {
        (line, table)
        for line, table in tables_of(path)
        if HOME[table] != path.name and table not in NAMES and (path.name, table) not in ALSO
    }
    assert elsewhere == set(), "move the statement to the file of HOME, or say in ALSO why it is here"


@pytest.mark.parametrize("path", sorted(POSTGRES.glob("*.py")), ids=lambda path: path.name)
def test_names_are_written_in_their_file_only(path: Path) -> None:
    written = {table for _, text in texts_of(path) for table in _WRITE.findall(text) if table in NAMES}
    assert {table for table in written if HOME[table] != path.name and (path.name, table) not in ALSO} == set()


def test_home_names_the_tables_of_the_migrations() -> None:
    text = "".join(path.read_text("utf-8") for path in (POSTGRES / "migrations").glob("*.sql"))
    created = set(re.findall(r"^create table consumer\.([a-z_]+)", text, re.MULTILINE))
    assert {*created, "schema_versions"} == {*HOME, *FORMER}


def test_the_lists_hold_nothing_that_is_gone() -> None:
    named = {(path.name, table) for path in POSTGRES.glob("*.py") for _, table in tables_of(path)}
    assert {(name, table) for name, table in ALSO if (name, table) not in named} == set()
    assert {table for table, name in HOME.items() if (name, table) not in named} == set()


def test_scanner_finds_a_statement_in_the_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        '"""Reads select from consumer.ledger in prose."""\n'
        "A = 'select 1 from consumer.ledger where x = $1'\n"
        "B = f'delete from consumer.held where {A}'\n"
        "C = 'run consumer.process'\n"
        "D = 'select consumer.turn($1)'\n"
        "# update consumer.positions\n"
    )
    assert list(tables_of(path)) == [(2, "ledger"), (3, "held")]
