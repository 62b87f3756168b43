"""`consumer outbox`: what is not published yet, and streams that stopped."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer.admin import outbox as admin
from consumer.admin.ledger_access import with_ledger
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, Refused, cli, command
from consumer.cli.operators import NeededWhy, Operator, acted_by
from consumer.cli.output import line, names, numbers, print_json, printable, show
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.outbox.streams import named
from consumer.postgres import outbox
from consumer.postgres.protocol import Connection
from consumer.settings import Settings

outbox_cli = typer.Typer(
    help="Outbox: what handlers published and Kafka has not acknowledged.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
cli.add_typer(outbox_cli, name="outbox")

StreamNumber = Annotated[
    int,
    typer.Argument(
        metavar="STREAM", min=1, max=2**31 - 1, help="a number, as `consumer outbox list` shows it", show_default=False
    ),
]


@command(outbox_cli, "list", (*POSTGRES, "wait_"))
def outbox_list(app: AppOrName, settings: Settings, shard: ShardName = None, as_json: AsJson = False) -> Any:
    """List the streams of the outbox.

    There is one for each input partition and topic that is published to. A stream that stopped publishes nothing until it is resumed; the others go on.
    """
    named = named_app(app)
    return over(named.app, shard, settings, as_json, lambda on: _list(named, on, as_json))


async def _list(named: NamedApp, settings: Settings, as_json: bool) -> int:
    async def ask(connection: Connection) -> list[outbox.StreamOverview]:
        await named.check(connection)
        return await outbox.overview(connection, named.name)

    streams = [admin.stream_as_dict(stream) for stream in await with_ledger(settings, ask)]
    if as_json:
        print_json(streams)
        return 0
    table = Table(*numbers("stream"), *names("from", "to"), *numbers("published", "unpublished"), "oldest", "stopped")
    for stream in streams:
        table.add_row(
            str(stream["stream"]),
            escape(_source(stream)),
            escape(stream["topic"]),
            f"{stream['published']:,}",
            f"{stream['unpublished']:,}",
            stream["oldest"] or "",
            escape(printable(stream["stopped"] or "")),
        )
    show(table, f"{named.name}: streams of the outbox")
    return 0


@command(outbox_cli, "show", (*POSTGRES, "wait_"))
def outbox_show(
    app: AppOrName,
    stream: StreamNumber,
    settings: Settings,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="so many of its next rows")] = 20,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Show one stream, its next rows, and the actions on it.

    Rows are shown without their bytes.
    """
    named = named_app(app)
    _check_shard(named, shard)
    return over(named.app, shard, settings, as_json, lambda on: _show(named, stream, limit, on, as_json))


async def _show(named: NamedApp, stream: int, limit: int, settings: Settings, as_json: bool) -> int:
    async def ask(connection: Connection) -> dict[str, Any]:
        await named.check(connection)
        return await admin.read_stream(connection, named.name, stream, limit)

    answer = await with_ledger(settings, ask)
    if as_json:
        print_json(answer)
        return 0
    line(f"stream {stream}: from {_source(answer)} to {answer['topic']}")
    line(f"published: {answer['published']:,}, unpublished: {answer['unpublished']:,}")
    if answer["stopped"]:
        line(f"stopped since {answer['stopped_at']}: {answer['stopped']}")
    table = Table(*numbers("row"), *names("id", "handler"), *numbers("offset", "key", "value"), "created", "type")
    for row in answer["rows"]:
        table.add_row(
            str(row["seq"]),
            row["id"],
            escape(row["handler"] or ""),
            _number(row["source_offset"]),
            _number(row["key_bytes"]),
            _number(row["value_bytes"]),
            row["created_at"],
            escape(printable(row["type"] or "")),
        )
    show(table, "next rows (key and value in bytes)")
    for action in answer["actions"]:
        count = action["to_seq"] - action["from_seq"]
        rows = f" {count:,} rows from {action['from_seq']}" if count else f" at {action['from_seq']}"
        line(f"{action['at']} {action['what']}{rows} by {action['operator']}: {action['why']}")
    return 0


@command(outbox_cli, "resume", (*POSTGRES, "wait_"))
def outbox_resume(
    app: AppOrName,
    stream: StreamNumber,
    settings: Settings,
    why: NeededWhy = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Let a stopped stream go on, from the row that Kafka refused.

    Remove the cause first: its reason is in `consumer outbox list`. Exit code 1 if the stream is not stopped.
    """
    return _act(app, stream, settings, 0, why, operator, shard, as_json)


@command(outbox_cli, "discard", (*POSTGRES, "wait_"))
def outbox_discard(
    app: AppOrName,
    stream: StreamNumber,
    settings: Settings,
    rows: Annotated[int, typer.Option("--rows", min=1, max=2**62, help="how many, beginning with the refused one")] = 1,
    why: NeededWhy = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Leave out rows of a stopped stream, and resume it.

    They are never published. Exit code 1 if the stream is not stopped.
    """
    return _act(app, stream, settings, rows, why, operator, shard, as_json)


def _act(
    app: str,
    stream: int,
    settings: Settings,
    discard: int,
    why: str | None,
    operator: str | None,
    shard: str | None,
    as_json: bool,
) -> Any:
    by = acted_by(operator, why, needs_why=True)
    named = named_app(app)
    _check_shard(named, shard)

    async def act(on: Settings) -> int:
        async def ask(connection: Connection) -> admin.Resumed:
            await named.check(connection)
            return await admin.resume(on, connection, named.name, stream, discard, by)

        done = await with_ledger(on, ask)
        if as_json:
            print_json(done.as_dict())
            return 0 if done.from_seq is not None else 1
        if done.from_seq is None or done.to_seq is None:
            raise Refused(f"stream {stream}: not stopped, or not of this App; see `consumer outbox list`")
        discarded = f"; {done.to_seq - done.from_seq:,} rows are never published" if discard else ""
        line(f"stream {stream} goes on at row {done.to_seq}{discarded}")
        return 0

    return over(named.app, shard, settings, as_json, act)


def _check_shard(named: NamedApp, shard: str | None) -> None:
    if named.app is not None and named.app.shards and shard is None:
        raise Misconfigured(
            f"--shard: each shard of App {named.name!r} has its own streams; choose one of {', '.join(named.app.shards)}"
        )


def _source(stream: dict[str, Any]) -> str:
    return named(Partition(stream["source_topic"], stream["source_partition"]))


def _number(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
