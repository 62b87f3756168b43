"""`consumer status` and `consumer probe`: print what admin/status.py reads.

`probe` is for health checks: it asks nothing that grows with the data, and no stopped partition makes it fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer.admin.status import Status, read_status
from consumer.admin.status import probe as probe_services
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import SERVICES, AppPath, AsJson, cli, command
from consumer.cli.output import line, names, numbers, print_json, show
from consumer.cli.per_shard import ShardName, over
from consumer.core.message import Partition
from consumer.outbox.streams import named
from consumer.settings import Settings

Exact = Annotated[bool, typer.Option("--exact", help="also count the ledger's rows, which is slow if there are many")]


@command(cli, "status", (*SERVICES, "wait_"))
def status(
    app: AppPath, settings: Settings, exact: Exact = False, shard: ShardName = None, as_json: AsJson = False
) -> Any:
    """Show positions, lag, what waits, what stopped, and counts.

    Exit code 1 while a partition has stopped or a handler fails for every message; the answer says why, and what to do.
    """
    loaded = load_app(app)
    return over(loaded, shard, settings, as_json, lambda on: print_status(loaded, app, on, as_json, exact))


@command(cli, "probe", (*SERVICES, "wait_"))
def probe(app: AppPath, settings: Settings, shard: ShardName = None, as_json: AsJson = False) -> Any:
    """Check that Kafka and PostgreSQL answer, for health checks.

    It is cheap, however large the ledger is.
    """
    loaded = load_app(app)
    return over(loaded, shard, settings, as_json, lambda on: _probe(on, as_json))


async def _probe(settings: Settings, as_json: bool) -> int:
    await probe_services(settings)
    if as_json:
        print_json({"kafka": "answers", "postgresql": "answers"})
    else:
        line("Kafka and PostgreSQL answer")
    return 0


async def print_status(app: App, path: str, settings: Settings, as_json: bool, exact: bool = False) -> int:
    """Print the status in one database; return the exit code."""
    answer = await read_status(app, path, settings, exact)
    if as_json:
        print_json(answer.as_dict())
    else:
        print_answer(answer, path)
    return 0 if answer.is_good else 1


def print_answer(answer: Status, path: str) -> None:
    _print_partitions(answer, path)
    for notice in answer.notices:
        line(notice.text)
        line(f"  to resolve it: {notice.do}")
    _print_waiting(answer.waiting)
    _print_handlers(answer.handlers)
    _print_outbox(answer.outbox, path)
    for name, counts in answer.open_dead_letters.items():
        dead, behind = counts.get("dead", 0), counts.get("waiting", 0)
        line(
            f"{name}: {dead:,} dead letters to decide on, {behind:,} waiting behind them: "
            f"consumer dlq list {path} --handler {name}"
        )
    for name, count in (answer.miscounts or {}).items():
        line(
            f"{name}: {count['rows']:,} applied rows in the ledger, {count['counter']:,} counted: rows or counters were "
            "changed by something other than a worker; the rows decide what is a duplicate"
        )


def _print_partitions(answer: Status, path: str) -> None:
    table = Table(*names("topic", "partition"), *numbers("position", "end", "lag", "waiting", "unread"))
    for partition in answer.partitions:
        position = "-" if partition["position"] is None else f"{partition['position']:,}"
        counts = (_count(partition[name]) for name in ("end", "lag", "waiting", "unread"))
        table.add_row(partition["topic"], str(partition["partition"]), position, *counts)
    show(table, f"{answer.app}: partitions")
    for topic in answer.missing_topics:
        line(f"topic {topic} does not exist")
    for partition in answer.partitions:
        place = f"{partition['topic']}:{partition['partition']}"
        if stop := partition["stopped"]:
            line(f"{place} has stopped: {stop['why']}")
            line(f"  to go on: {stop['do']}")
        if pause := partition["paused"]:
            target = "" if pause["topic"] is None else f" --topic {pause['topic']}"
            target += "" if pause["partition"] is None else f" --partition {pause['partition']}"
            line(f"{place} is paused since {pause['since']} by {pause['operator']}: {pause['why']}")
            line(f"  to go on: consumer resume {path}{target} --why TEXT")
        if transaction := partition["open_transaction"]:
            line(
                f"{place} is held back at {transaction['offset']} by a producer's transaction that is open since "
                f"{transaction['since']}"
            )


def _print_waiting(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        why = "every message of the handler fails so" if row["systemic"] else "is tried again"
        line(
            f"waiting: {row['handler']} {row['topic']}:{row['partition']}: {row['count']:,} since {row['since']}: "
            f"{row['error']} ({why})"
        )


def _print_handlers(handlers: Mapping[str, dict[str, Any]]) -> None:
    table = Table(
        *names("handler"), *numbers("applied", "duplicates", "dead letters", "skipped"), "duplicates by cause"
    )
    for name, counts in handlers.items():
        causes = ", ".join(f"{cause} {count:,}" for cause, count in counts["duplicates"].items() if count)
        table.add_row(
            escape(name),
            f"{counts['applied']:,}",
            f"{sum(counts['duplicates'].values()):,}",
            f"{counts['dead_lettered']:,}",
            f"{counts['skipped']:,}",
            causes,
        )
    show(table, "handlers")


def _print_outbox(outbox: Mapping[str, Any], path: str) -> None:
    if outbox["unpublished"]:
        intake = f", {outbox['intake']:,} of them not in a stream yet" if outbox["intake"] else ""
        line(f"outbox: {outbox['unpublished']:,} rows not published yet{intake}, the oldest of {outbox['oldest']}")
    for stream in outbox["stopped"]:
        source = named(Partition(stream["source_topic"], stream["source_partition"]))
        line(f"outbox: stream {stream['stream']} from {source} to {stream['topic']} has stopped: {stream['stopped']}")
        line(f"  to go on: consumer outbox resume {path} {stream['stream']} --why TEXT")


def _count(number: int | None) -> str:
    """Return a number as text; "?" if no leader answers."""
    return "?" if number is None else f"{number:,}"
