"""The `consumer` command. Turns arguments into calls and answers into text; decides nothing.

Exit codes: 0 a good answer, 1 the answer is no (unknown, not up to date, restarts did not help), 2 it could not start or
could not tell. Every error is one line on standard error, without a traceback, which would quote what the error quotes.
"""

from __future__ import annotations

import asyncio
import getpass
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer import logs, tls
from consumer.admin import report
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli import interrupts
from consumer.cli import positions as positions_command
from consumer.cli.per_shard import ShardName, ShardsOf, over
from consumer.cli.status import status_of
from consumer.cli.terminal import POSTGRES, SERVICES, AppPath, AsJson, cli, command, out, print_json
from consumer.cli.terminal import connected as _connected
from consumer.cli.terminal import with_ledger as _with_ledger
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.core.identity import OffsetId
from consumer.core.shard_route import Router
from consumer.core.suggestions import UnknownName, suggestion
from consumer.handler_records import coverage, notices
from consumer.kafka.source import Source
from consumer.postgres import grants, ledger
from consumer.postgres import migrate as schema
from consumer.retention import task
from consumer.settings import Settings
from consumer.sharding import shards
from consumer.worker.supervisor import Supervisor

_LAST_LINES_SECONDS = 2.0  # of the log, at the end: its pipe may be full
# They register themselves. `run` does without them, and is there sooner.
_OTHERS = ("diagram", "dlq", "dlq_settle", "purge", "replay")


def whole() -> typer.Typer:
    """The command with everything that it can do."""
    for each in _OTHERS:
        importlib.import_module(f"consumer.cli.{each}")
    return cli


def main() -> None:
    """Entry of the command."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by who started us: else the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    interrupts.end_at_once()
    (cli if sys.argv[1:2] == ["run"] else whole())(prog_name="consumer")


def _version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("idempotent-consumer"))
        raise typer.Exit(0)


@cli.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Consume Kafka topics with each message's effects applied exactly once."""


# -- run --------------------------------------------------------------------------------------------------------------


@command(
    cli,
    "run",
    (
        "kafka_",
        "postgres_",
        "ledger_",
        "redis_",
        "precheck_",
        "allow_",
        "dead_letter_",
        "lanes",
        "batch_",
        "buffer_",
        "parked_",
        "grace_",
        "wait_",
        "handler_",
        "worker_",
        "watchdog_",
        "restarts_",
        "log_",
    ),
)
def run(
    app: AppPath,
    settings: Settings,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, max=256, envvar="CONSUMER_WORKERS", help="worker processes")
    ] = 1,
) -> Any:
    """Run worker processes until SIGTERM or Ctrl-C, which drains them; a second one ends them at once.

    Each worker is a member of the Kafka group named like the App. Check the configuration first with
    `consumer migrate --check` and `consumer status APP`.
    """
    loaded = load_app(app)
    return _run(app, loaded, workers, settings)


async def _run(path: str, app: App, workers: int, settings: Settings) -> int:
    supervisor = Supervisor(path, app.name, workers, settings)
    try:
        await supervisor.prepare()
        # Before any worker begins: what is wrong for one is wrong for all, and one line tells it.
        await _ready(app, path, settings)
    except BaseException:
        await supervisor.give_up()
        raise
    logs.never_wait()
    code = 1
    try:
        code = await supervisor.run()
    finally:
        if not logs.end(_LAST_LINES_SECONDS):
            os._exit(code)  # a thread that waits for a full pipe keeps the process
    return code


async def _ready(app: App, path: str, settings: Settings) -> None:
    async def resources() -> None:
        async with app.running():
            pass

    by_shard = shards.settings_of(app, settings)
    for each in by_shard.values():
        each.dsn  # noqa: B018 - raises when there is none
    target = settings.dead_letter_topic
    if target in app.topics:
        raise Misconfigured(
            f"--dead-letter-topic {target}: {app.name!r} consumes that topic itself, so its dead letters would come back to it for ever"
        )
    try:
        async with asyncio.timeout(max(settings.wait_seconds, 1)) as limit:
            await resources()
    except (Misconfigured, asyncio.CancelledError):
        raise
    except (Exception, SystemExit) as error:
        if limit.expired():
            raise Misconfigured(f"the lifespan of {app.name!r} took longer than --wait") from None
        raise Misconfigured(f"the lifespan of {app.name!r} failed: {logs.describe(error)}") from None
    opened = [(each, await _postgres_ready(each)) for each in by_shard.values()]
    try:
        await shards.check(app, Router(tuple(app.shards) or ("",), app.route), opened)
        for on, session in opened:
            with ledger.sorted_errors(on):
                for notice in await notices.at_start(session.connection, app, path):
                    logs.event(30, notice.text, do=notice.do)
    except ledger.Outage as error:
        raise ServiceUnavailable(str(error)) from None
    finally:
        for _, session in opened:
            session.close()
    if (redis_url := tls.redis_url(settings)) is not None:
        from consumer.precheck.client import Precheck

        precheck = Precheck(redis_url, app.name, 1, 1)
        try:
            await precheck.start("")
        finally:
            await precheck.stop()
    source = Source(settings, None)
    await source.start(settings.wait_seconds)
    try:
        missing = [topic for topic, found in (await source.partitions(app.topics)).items() if not found]
        if target is not None and not (await source.partitions([target]))[target]:
            raise Misconfigured(f"--dead-letter-topic {target}: there is no such topic yet: it is not made by itself")
        await task.check(settings, list(app.topics))
    finally:
        await source.stop(5)
    for topic in missing:
        logs.event(30, "topic does not exist yet; it is consumed as soon as it does", topic=topic)
    for handler in app.handlers.values():
        if isinstance(handler.rule, OffsetId) and handler.idempotent:
            from consumer.worker.worker import OFFSET_IDS

            logs.event(30, OFFSET_IDS, handler=handler.name)


async def _postgres_ready(settings: Settings) -> ledger.Session:
    deadline = asyncio.get_running_loop().time() + settings.wait_seconds
    told = False
    while True:
        try:
            left = max(0.5, deadline - asyncio.get_running_loop().time())
            return await ledger.Session.open(settings, min(10, left))
        except ledger.Outage as error:
            if asyncio.get_running_loop().time() + 0.5 > deadline:
                raise ServiceUnavailable(f"{error} (waited {settings.wait_seconds:g} s)") from None
            if not told:
                logs.event(30, "waiting for postgresql", place=ledger.where(settings.dsn))
            told = True
            await asyncio.sleep(0.5)


# -- migrate ----------------------------------------------------------------------------------------------------------


@command(cli, "migrate", (*POSTGRES, "wait_"))
def migrate(
    settings: Settings,
    sql: Annotated[bool, typer.Option("--sql", help="print the SQL and change nothing")] = False,
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit 1 when something is to be done")] = False,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", help="your own SQL, run after ours in the same transaction; write it so that it may run again"
        ),
    ] = None,
    grants_for: Annotated[
        str | None,
        typer.Option(
            "--grants", metavar="ROLE", help="print the rights that a worker's role needs, and change nothing"
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="with --grants: those of a role for `status`, `show` and dashboards")
    ] = False,
    new_epoch: Annotated[
        bool,
        typer.Option(
            "--new-epoch", help="declare that the database was put back from a copy of its disk: Redis's marks end"
        ),
    ] = False,
    rename_handler: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            "--rename-handler",
            metavar="APP OLD NEW",
            help="give handler OLD of the App (its name, not its path) the name NEW in the ledger, and keep what it has settled; "
            "running workers reconnect, and those with the old code are refused",
        ),
    ] = None,
    shards_of: ShardsOf = None,
    shard: ShardName = None,
    new_route: Annotated[
        bool,
        typer.Option(
            "--new-route",
            help="with --shards: declare that the App's shards or route have changed, and every key that moves was moved "
            "(docs/how-to/shards.md); without it a change is refused",
        ),
    ] = False,
) -> Any:
    """Create or update the ledger's tables (schema "consumer"). Safe when several run at once.

    Run it as a role that owns them and that only this command uses. Workers need less: `consumer migrate --grants ROLE`
    prints what, as SQL for the owner.
    """
    only = [sql, check, grants_for is not None]
    if sum(only) > 1 or (any(only) and (file or new_epoch)):
        raise Misconfigured(
            "--sql, --check and --grants change nothing: give one of them, and neither --file nor --new-epoch"
        )
    if grants_for is not None:
        print(grants.as_sql(grants_for, grants.For.READER if read_only else grants.For.WORKER), end="")
        return 0
    if read_only:
        raise Misconfigured("--read-only goes with --grants ROLE")
    if sql:
        print(schema.as_sql(), end="")
        return 0
    own = []
    for path in file or []:
        try:
            own.append(path.read_text("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise Misconfigured(f"--file {path}: {error}") from None
    if new_route and (shards_of is None or shard is not None or check):
        raise Misconfigured("--new-route goes with --shards APP, for all of its shards, and without --check")
    names = [str(path) for path in file or []]
    if rename_handler is not None:
        if any(only) or file or new_epoch or new_route:
            raise Misconfigured("--rename-handler goes with --shards and --shard alone")
        return over(shards_of, shard, settings, False, lambda on: _rename(on, *rename_handler))

    async def run(on: Settings) -> int:
        return await _migrate(on, check, own, names, new_epoch)

    return _migrate_shards(shards_of, shard, settings, run, new_route)


async def _migrate_shards(
    path: str | None,
    shard: str | None,
    settings: Settings,
    run: Callable[[Settings], Coroutine[Any, Any, int]],
    new: bool,
) -> int:
    code = await over(path, shard, settings, False, run)
    if new and path is not None:
        app = load_app(path)
        for name, on in shards.settings_of(app, settings).items():
            await _with_ledger(on, partial(shards.forget, app, name))
        print("the shards and the route of the App are as they are now: workers may be started")
    return code


async def _rename(settings: Settings, app: str, old: str, new: str) -> int:
    if old == new or not new:
        raise Misconfigured("--rename-handler: OLD and NEW must be two names")
    operator = getpass.getuser() if sys.stdin is not None else ""

    async def carry_out(connection: Any) -> None:
        await coverage.rename(connection, app, old, new, operator)

    try:
        await _with_ledger(settings, carry_out)
    except Exception as error:
        if ledger.sqlstate_of(error) is None:
            raise
        raise Misconfigured(
            f"{ledger.where(settings.dsn)}: {ledger.said(error)} (nothing was changed; run it as the owner of the schema)"
        ) from None
    print(f"handler {old!r} of App {app!r} is {new!r} in the ledger now; workers with the old name are refused")
    return 0


async def _migrate(settings: Settings, check: bool, own: list[str], names: list[str], new_epoch: bool) -> int:
    connection = await _connected(settings)
    try:
        if check:
            todo = await schema.pending(connection)
            for each in todo:
                print(f"pending: {each.version:04} {each.name}")
            print("the schema is not up to date: run `consumer migrate`" if todo else "the schema is up to date")
            return 1 if todo else 0
        done = await schema.migrate(connection, *own, names=names, new_epoch=new_epoch)
    except Exception as error:
        if ledger.sqlstate_of(error) is None:
            raise
        raise Misconfigured(f"{ledger.where(settings.dsn)}: {ledger.said(error)} (nothing was changed)") from None
    finally:
        connection.terminate()
    for each in done:
        print(f"applied: {each.version:04} {each.name}")
    told = [f"; {len(own)} file(s) of your own were run"] if own else []
    told += ["; a new epoch has begun"] if new_epoch else []
    print("the schema is up to date" + "".join(told))
    if done:
        print("workers need few rights on it: `consumer migrate --grants ROLE` prints them")
    return 0


# -- looking at it ----------------------------------------------------------------------------------------------------


@command(cli, "show", (*POSTGRES, "wait_"))
def show(
    message_id: Annotated[
        str,
        typer.Argument(
            metavar="MESSAGE_ID",
            help="the id as its producer sent it (after -- when it begins with a dash)",
            show_default=False,
        ),
    ],
    settings: Settings,
    hexadecimal: Annotated[bool, typer.Option("--hex", help="MESSAGE_ID is the id's bytes in hexadecimal")] = False,
    source: Annotated[str | None, typer.Option("--source", help="the source, for the id of a CloudEvent")] = None,
    shards_of: ShardsOf = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """What became of a message: when, from where, by which handler; exit 1 when it is unknown."""
    wanted: str | bytes = message_id
    if hexadecimal:
        try:
            wanted = bytes.fromhex(message_id)
        except ValueError:
            raise Misconfigured(f"--hex {message_id}: not hexadecimal") from None
    return _show_in(shards_of, shard, wanted, source, settings, as_json)


async def _show_in(
    path: str | None, shard: str | None, wanted: str | bytes, source: str | None, settings: Settings, as_json: bool
) -> int:
    codes: list[int] = []

    async def run(on: Settings) -> int:
        codes.append(await _show(wanted, source, on, as_json))
        return 0

    await over(path, shard, settings, as_json, run)
    return min(codes)  # known to one of them is known


async def _show(wanted: str | bytes, source: str | None, settings: Settings, as_json: bool) -> int:
    found = await _with_ledger(settings, lambda connection: report.find_message(connection, wanted, source))
    if as_json:
        print_json(found)
        return 0 if found["handlers"] else 1
    if not found["handlers"]:
        out.print("unknown: no handler has applied this id, and it is no dead letter", markup=False)
        return 1
    for each in found["handlers"]:
        line = f"{each['state']} by {each['app']}/{each['handler']} at {each['at']} from {each['topic']}:{each['partition']}:{each['offset']}"
        if each["letter"]:
            line += f" ({each['reason']}; consumer dlq show {each['letter']})"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


@command(cli, "positions", (*SERVICES, "wait_"))
def positions(
    app: AppPath,
    settings: Settings,
    topic: Annotated[str | None, typer.Option("--topic", help="the topic to move")] = None,
    partition: Annotated[
        int | None, typer.Option("--partition", min=0, help="the partition to move (default: all of the topic)")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="earliest, latest, committed (the offset that the group has committed in Kafka), an offset, a time such as "
            "2026-11-25T10:00:00Z, or how long ago, such as 90m, 24h or 7d",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="with --to: show what would move, and change nothing")
    ] = False,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="the topic was deleted and made anew, or this is another cluster: begin at the beginning of what is there now "
            "(one partition, or all of the topic that stopped for this)",
        ),
    ] = False,
    apply_again: Annotated[
        bool,
        typer.Option(
            "--apply-again",
            help="with --to: go back although message_id= has changed, and apply again what was applied under other ids",
        ),
    ] = False,
    handler: Annotated[
        str | None, typer.Option("--handler", help="with --begin-here and --accept-id-rule: the handler")
    ] = None,
    begin_here: Annotated[
        bool,
        typer.Option(
            "--begin-here",
            help="record that the handler begins where it is now: what it has missed is left, and no longer reported",
        ),
    ] = False,
    accept_id_rule: Annotated[
        bool,
        typer.Option(
            "--accept-id-rule",
            help="record that message_id= of the handler was changed on purpose: stop the workers with the old code first",
        ),
    ] = False,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Show the positions in PostgreSQL, or move some; running workers notice and go on from there.

    These count, not the group's offsets in Kafka. Going back applies nothing twice, because the ids are in the ledger;
    it is refused after message_id= of a handler has changed. Going forward skips the messages in between for good.
    --adopt starts new ids for messages that are identified by their offset: copies of old ones would be applied again.
    """
    loaded = load_app(app)
    if adopt and (to is not None or topic is None):
        raise Misconfigured("--adopt goes with --topic, and maybe --partition, and without --to")
    if accept_id_rule and (
        begin_here or handler is None or adopt or topic is not None or to is not None or partition is not None
    ):
        raise Misconfigured("--accept-id-rule goes with --handler alone")
    if (begin_here or accept_id_rule) != (handler is not None) or (
        begin_here and (adopt or to is not None or partition is not None)
    ):
        raise Misconfigured(
            "--begin-here goes with --handler, and maybe --topic, and without --to, --partition and --adopt"
        )
    if (dry_run or apply_again) and to is None:
        raise Misconfigured(f"{'--dry-run' if dry_run else '--apply-again'} goes with --to")
    if not adopt and not begin_here and ((topic is None) != (to is None) or (partition is not None and to is None)):
        raise Misconfigured("to move positions, give --topic and --to, and --partition for one of them")
    if handler is not None:
        positions_command.check_handler(loaded, app, handler)

    async def run(on: Settings) -> int:
        if handler is not None and accept_id_rule:
            return await positions_command.accept_id_rule(loaded, handler, on, as_json)
        if handler is not None:
            return await positions_command.begin_here(loaded, handler, topic, on, as_json)
        if topic is None:
            return await status_of(loaded, app, on, as_json)
        if to is None:
            return await positions_command.adopt(loaded, topic, partition, on, as_json)
        return await positions_command.move(
            loaded, topic, partition, to, on, dry_run=dry_run, apply_again=apply_again, as_json=as_json
        )

    if topic is not None and topic not in loaded.topics:
        raise UnknownName(f"{app} has no handler of topic {topic!r}; {suggestion(topic, loaded.topics)}")
    return over(loaded, shard, settings, as_json, run)


@command(cli, "demo")
def demo(
    payments: Annotated[int, typer.Option("--payments", min=100, max=1_000_000, help="messages to produce")] = 20_000,
    workers: Annotated[int, typer.Option("--workers", min=2, max=8, help="worker processes")] = 2,
    as_json: AsJson = False,
) -> Any:
    """Produce payments with duplicates, kill a worker in the middle, and show that every balance is right.

    Starts an embedded broker, PostgreSQL and Valkey of its own, and removes them at the end.
    """
    from consumer.demo import Demo  # its servers are an extra

    return Demo(payments, workers, as_json=as_json).run()
