"""Tables at 80 columns: no identifier is cut or broken.

However long it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from consumer.admin.status import Status
from consumer.cli import dlq, output, purge, replay_output, status
from consumer.core.message import Partition
from consumer.replay.findings import Findings

pytestmark = pytest.mark.unit

TOPIC = "shop.payments.captured-by-card.v2"
LONG = "a-handler-with-a-name-that-is-longer-than-a-terminal-of-eighty-columns-is-wide-" + "x" * 10


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is printed on a terminal of 80 columns."""
    printed = io.StringIO()
    console = Console(file=printed, width=80, emoji=False)
    for module in (output, replay_output):
        monkeypatch.setattr(module, "out", console)
    yield printed


def has_whole(printed: io.StringIO, *identifiers: str) -> bool:
    lines = printed.getvalue().splitlines()
    missing = [identifier for identifier in identifiers if not any(identifier in line for line in lines)]
    assert (missing, "…" in printed.getvalue()) == ([], False), printed.getvalue()
    return True


def fits(printed: io.StringIO) -> bool:
    return max(map(len, printed.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(("handler", "is_table"), [("settle", True), (LONG, False)])
def test_status_is_a_table_where_it_fits_and_else_lines(terminal: io.StringIO, handler: str, is_table: bool) -> None:
    duplicates = {"batch": 12, "precheck": 3_000_000, "ledger": 4, "dead_letter": 5}
    counts = {"applied": 123_456_789, "duplicates": duplicates, "dead_lettered": 12, "skipped": 0}
    lag = {"position": 1_000_000, "end": 2_000_000, "lag": 1_000_000, "waiting": 12, "unread": 0}
    partition = {"topic": TOPIC, "partition": 100, **lag, "stopped": None, "open_transaction": None, "paused": None}
    answer = Status(
        app="shop",
        handlers={handler: counts},
        open_dead_letters={handler: {"dead": 3}},
        partitions=[partition],
        missing_topics=[],
        waiting=[],
        notices=[],
        gaps=[],
        outbox={"unpublished": 0, "oldest": None, "stopped": []},
    )
    status.print_answer(answer, "shop:app")
    assert has_whole(terminal, TOPIC, handler, "1,000,000", "123,456,789", "100")
    table = terminal.getvalue().split("dead letters to decide")[0]
    assert ("┃ handler" in table) == is_table


ROW = {
    "letter": 1_234_567,
    "app": "shop-of-payments",
    "handler": "settle_captured_payments",
    "topic": TOPIC,
    "partition": 12,
    "offset": 123_456_789,
    "state": "waiting",
    "reason": "ambiguous_message_id",
    "group": "5f2a90c1de",
    "kind": "ForeignKeyViolationError",
    "error": "insert or update on table payments violates a foreign key constraint",
    "attempts": 5,
    "count": 1_000_000,
    "died_at": "2026-11-25T10:00:00+00:00",
    "at": "2026-11-25T10:00:00+00:00",
    "operator": "an-operator@shop.example",
    "what": "discard",
    "outcome": "discarded",
    "note": "a note that is as long as notes are",
}


@pytest.mark.parametrize(
    ("show", "columns"),
    [
        (dlq.print_dead_letters, ("letter", "app", "handler", "state", "reason", "group")),
        (dlq.print_groups, ("letter", "app", "handler", "reason", "group", "kind")),
        (dlq.print_actions, ("letter", "operator", "what", "outcome")),
    ],
)
def test_dead_letters_keep_their_identifiers_whole(terminal: io.StringIO, show: Any, columns: tuple[str, ...]) -> None:
    show([ROW])
    assert has_whole(terminal, *(str(ROW[column]) for column in columns))


def test_purge_keeps_times_and_partitions_whole(terminal: io.StringIO) -> None:
    generation = {
        "number": 12,
        "opened_at": "2026-11-25T10:00:00+00:00",
        "closed_at": "2026-11-25T11:00:00+00:00",
        "drop": False,
        "why": f"the log of {TOPIC}:12 still holds records of its time",
        "rows": 1_234_567_890,
    }
    lists: dict[str, list[Any]] = {name: [] for name in ("objections", "warnings", "done")}
    purge.print_answer({"dry_run": True, "generations": [generation], "horizon": None, **lists})
    assert has_whole(terminal, generation["opened_at"], generation["closed_at"], "1,234,567,890", f"{TOPIC}:12")  # type: ignore[arg-type]


@pytest.mark.parametrize("handler", ["settle", LONG])
def test_replay_and_rebuild_keep_names_whole(terminal: io.StringIO, handler: str) -> None:
    findings = Findings("shop", "check", "2026-11-25T10:00:00+00:00")
    for outcome in ("applied", "missing", "conflicts", "unreadable", "unknown"):
        findings.count(handler, Partition(TOPIC, 0), outcome, 123_456)
    table = {
        "table": "accounting.balances_of_customers",
        **{name: 1_234_567 for name in ("rows", "rebuilt", "missing", "extra", "different")},
        "matched_by": ["customer_account_number"],
        "ignored": {"updated_at": "a time"},
    }
    findings.rebuilt = {"tables": [table], "differences": []}
    answer = findings.as_dict() | {"problems": [], "unknown": [], "answer": "No"}
    replay_output.show(findings, answer)
    assert has_whole(terminal, handler, "123,456", "accounting.balances_of_customers", "1,234,567")
    assert has_whole(terminal, "customer_account_number")


def test_text_of_a_table_is_wrapped_and_fits(terminal: io.StringIO) -> None:
    row = {**ROW, "app": "shop", "handler": "settle", "topic": "orders", "reason": "failed", "operator": "ann"}
    dlq.print_actions([{**row, "note": "word " * 16}])
    assert fits(terminal)
