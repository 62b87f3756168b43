"""`consumer status` and `consumer probe`: what became of everything, and whether the services answer.

Turns answers into text. `status` reads counters and positions, no row of the ledger; `--exact` counts the rows too. `probe` is for
health checks: it asks nothing that grows with the data, and no partition that waits for a person turns it red.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer.admin import report
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import SERVICES, AppPath, AsJson, cli, command
from consumer.cli.ledger_access import with_ledger as _with_ledger
from consumer.cli.output import out, print_json
from consumer.cli.output import right as _right
from consumer.cli.per_shard import ShardName, over
from consumer.core.message import Partition
from consumer.handler_records import notices
from consumer.kafka import group
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres import waiting_messages
from consumer.settings import Settings

Exact = Annotated[
    bool, typer.Option("--exact", help="also count the ledger's rows, and compare: slow where there are many")
]


@command(cli, "status", (*SERVICES, "wait_"))
def status(
    app: AppPath, settings: Settings, exact: Exact = False, shard: ShardName = None, as_json: AsJson = False
) -> Any:
    """Positions and lag of every partition, what waits, and what became of the messages of every handler.

    Exit code 1 while a partition has stopped or a handler fails for every message: why, and what to do, is shown.
    """
    loaded = load_app(app)
    return over(loaded, shard, settings, as_json, lambda on: status_of(loaded, app, on, as_json, exact))


@command(cli, "probe", (*SERVICES, "wait_"))
def probe(app: AppPath, settings: Settings, shard: ShardName = None, as_json: AsJson = False) -> Any:
    """Whether Kafka and PostgreSQL answer from here: for health checks, cheap however large the ledger is."""
    loaded = load_app(app)
    return over(loaded, shard, settings, as_json, lambda on: _probe(on, as_json))


async def _probe(settings: Settings, as_json: bool) -> int:
    async def nothing(_: Any) -> None:
        return None

    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        await _with_ledger(settings, nothing)
    finally:
        await source.stop(5)
    if as_json:
        print_json({"kafka": "answers", "postgresql": "answers"})
    else:
        out.print("Kafka and PostgreSQL answer", markup=False, highlight=False)
    return 0


async def status_of(app: App, path: str, settings: Settings, as_json: bool, exact: bool = False) -> int:
    """Print the status of an App in one database; returns the exit code."""
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)

    async def ask(connection: Any) -> tuple[Any, ...]:
        lags = await report.partition_lags(connection, source, app)
        found = [Partition(each["topic"], each["partition"]) for each in lags[0]]
        members = await group.look(settings, app.name)
        return (
            await report.handler_counts(connection, app),
            await report.open_letters(connection, app),
            lags,
            await report.partition_health(connection, source, app, found, members.commits),
            (await waiting_messages.read(connection, app.name))[0],
            await report.miscounts(connection, app) if exact else None,
            await notices.gather(connection, app, path, members, lags[1]),
        )

    try:
        found = await _with_ledger(settings, ask)
        handlers, letters, (partitions, missing), health, waits, miscounts, (told, coverage) = found
    finally:
        await source.stop(5)
    for each in partitions:
        each |= _health(health[Partition(each["topic"], each["partition"])], path)
    is_bad = (
        any(each["stopped"] for each in partitions)
        or any(each["systemic"] for each in waits)
        or any(each.is_problem for each in told)
        or miscounts
    )
    if as_json:
        print_json(_as_json(app, handlers, letters, partitions, missing, waits, told, coverage.gaps, miscounts))
        return 1 if is_bad else 0
    _show_partitions(app, partitions, missing)
    for notice in told:
        _line(f"{notice.text}\n  to resolve it: {notice.do}")
    _show_waiting(waits)
    _show_handlers(handlers, letters, path)
    for name, each in (miscounts or {}).items():
        _line(
            f"{name}: {each['rows']:,} applied rows in the ledger, {each['counter']:,} counted: workers of a version before "
            "0.2 ran after the migration"
        )
    return 1 if is_bad else 0


def _as_json(
    app: App,
    handlers: dict[str, Any],
    letters: dict[str, Any],
    partitions: list[dict[str, Any]],
    missing: list[str],
    waits: list[dict[str, Any]],
    shown_notices: Sequence[notices.Notice],
    gaps: Sequence[Any],
    miscounts: dict[str, Any] | None,
) -> dict[str, Any]:
    """The answer of `consumer status --json`."""
    answer = {
        "app": app.name,
        "handlers": handlers,
        "open_letters": letters,
        "partitions": partitions,
        "missing_topics": missing,
        "waiting": waits,
        "notices": [notice.as_dict() for notice in shown_notices],
        "gaps": [
            {"handler": gap.handler, **gap.partition._asdict(), "first": gap.first, "past": gap.past} for gap in gaps
        ],
    }
    return answer if miscounts is None else answer | {"miscounts": miscounts}


def _show_partitions(app: App, partitions: list[dict[str, Any]], missing: Iterable[str]) -> None:
    table = Table(
        "topic",
        "partition",
        *_right("position", "end", "lag", "waiting", "unread"),
        title=f"{app.name}: partitions",
        title_justify="left",
    )
    for each in partitions:
        position = "-" if each["position"] is None else f"{each['position']:,}"
        numbers = (_count(each[name]) for name in ("end", "lag", "waiting", "unread"))
        table.add_row(each["topic"], str(each["partition"]), position, *numbers)
    out.print(table)
    for topic in missing:
        _line(f"topic {topic} does not exist")
    for each in partitions:
        place = f"{each['topic']}:{each['partition']}"
        if stop := each["stopped"]:
            _line(f"{place} has stopped: {stop['why']}\n  to go on: {stop['do']}")
        if held := each["open_transaction"]:
            _line(
                f"{place} is held back at {held['offset']} by a producer's transaction that is open since {held['since']}"
            )


def _show_waiting(waits: list[dict[str, Any]]) -> None:
    for each in waits:
        why = "every message of the handler fails so" if each["systemic"] else "is tried again"
        _line(
            f"waiting: {each['handler']} {each['topic']}:{each['partition']}: {each['count']:,} since {each['since']}: "
            f"{each['error']} ({why})"
        )


def _show_handlers(handlers: dict[str, Any], letters: dict[str, Any], of: str) -> None:
    table = Table(
        "handler",
        *_right("applied", "duplicates", "dead letters", "skipped"),
        "duplicates by cause",
        title="handlers",
        title_justify="left",
    )
    for name, each in handlers.items():
        causes = ", ".join(f"{cause} {count:,}" for cause, count in each["duplicates"].items() if count)
        table.add_row(
            escape(name),
            f"{each['applied']:,}",
            f"{sum(each['duplicates'].values()):,}",
            f"{each['dead_lettered']:,}",
            f"{each['skipped']:,}",
            causes,
        )
    out.print(table)
    for name, each in letters.items():
        dead, behind = each.get("dead", 0), each.get("waiting", 0)
        _line(
            f"{name}: {dead:,} dead letters to decide on, {behind:,} waiting behind them: consumer dlq list {of} --handler {name}"
        )


def _count(number: int | None) -> str:
    """A number for a table; a question mark where no leader tells it."""
    return "?" if number is None else f"{number:,}"


def _line(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _health(health: report.Health, path: str) -> dict[str, Any]:
    """What `status --json` adds to a partition."""
    stop, held = health.stop, health.open_transaction
    return {
        "topic_id": None if health.topic_id is None else str(health.topic_id),
        "stopped": stop
        and {
            "reason": stop.reason.value,
            "why": stop.text,
            "missing": stop.missing and {"first": stop.missing[0], "last": stop.missing[1]},
            "do": stop.command(path),
        },
        "open_transaction": held
        and {
            "offset": held.offset,
            "since": datetime.fromtimestamp(held.since_ms / 1000, UTC).isoformat(timespec="seconds"),
        },
    }
