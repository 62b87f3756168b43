"""`consumer audit`: what operators did, when and why."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer.admin import audit as admin
from consumer.admin.ledger_access import with_ledger
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, cli, command
from consumer.cli.output import line, names, numbers, print_json, printable, show
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.audit import known_actions
from consumer.core.errors import Misconfigured
from consumer.core.suggestions import check_known
from consumer.kafka.bounds import Time
from consumer.kafka.log_reader import parse
from consumer.postgres.protocol import Connection
from consumer.settings import Settings


@command(cli, "audit", (*POSTGRES, "wait_"))
def audit(
    app: AppOrName,
    settings: Settings,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="only later than 2026-11-25T10:00:00Z, or for so long: 90m, 24h, 7d"
        ),
    ] = None,
    of_action: Annotated[
        str | None,
        typer.Option("--action", metavar="NAME", help="only this action, such as 'dlq discard', or all of dlq"),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="the newest so many")] = 50,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """List what operators did: who, when, why, and the result.

    Every action is recorded in PostgreSQL, in the transaction that does it where it is one. An action of many transactions is recorded
    twice, as begun and as done. No part of a message is in the record.

    \b
    Examples:
      consumer audit shop:app --since 7d
      consumer audit shop:app --action positions --json
    """  # fmt: skip
    if of_action is not None:
        check_known("--action", of_action, known_actions(), "this command")
    after = None if since is None else _seconds(since)
    named = named_app(app)
    return over(named.app, shard, settings, as_json, lambda on: _audit(named, of_action, after, limit, on, as_json))


def _seconds(text: str) -> float:
    match parse(text, "--since", int(time.time() * 1000), "a time"):
        case Time(milliseconds):
            return milliseconds / 1000
        case _:
            raise Misconfigured(
                f"--since {text[:40]!r}: not a time; write 2026-11-25T10:00:00Z, 90m, 24h or 7d, for example"
            )


async def _audit(
    named: NamedApp, action: str | None, since: float | None, limit: int, settings: Settings, as_json: bool
) -> int:
    async def ask(connection: Connection) -> list[dict[str, Any]]:
        await named.check(connection)
        return await admin.entries(connection, named.name, action, since, limit)

    rows = await with_ledger(settings, ask)
    if as_json:
        print_json(rows)
    else:
        print_entries(rows)
    return 0


def print_entries(rows: Sequence[dict[str, Any]]) -> None:
    """Print entries as a table, the newest first."""
    if not rows:
        line("no actions")
        return
    table = Table(*numbers("entry"), *names("at", "who", "database user", "action", "of"), "result", "numbers", "why")
    for row in rows:
        table.add_row(
            str(row["entry"]),
            row["at"][:19],
            escape(printable(row["operator"])),
            escape(printable(row["db_user"])),
            row["action"],
            escape(_target(row)),
            escape(printable(row["result"])),
            escape(json.dumps(row["numbers"])) if row["numbers"] else "",
            escape(printable(row["why"])),
        )
    show(table)


def _target(row: dict[str, Any]) -> str:
    """Return what an action was on."""
    if row["dead_letter"] is not None:
        return f"letter {row['dead_letter']}"
    if row["stream"] is not None:
        return f"stream {row['stream']}"
    if row["topic"] is None:
        return "" if row["app"] is not None else "all Apps"
    return str(row["topic"]) if row["partition"] is None else f"{row['topic']}:{row['partition']}"
