"""`consumer pause` and `consumer resume`: stop settling, without stopping workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer

from consumer.admin import pauses as admin
from consumer.admin.ledger_access import with_ledger
from consumer.admin.pauses import PauseResult, Target, pause_as_dict
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, Refused, cli, command
from consumer.cli.operators import NeededWhy, Operator, acted_by
from consumer.cli.output import line, print_json
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.audit import ActedBy
from consumer.core.errors import Misconfigured
from consumer.postgres.protocol import Connection
from consumer.settings import Settings

_Topic = Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="only this topic")]
_Partition = Annotated[int | None, typer.Option("--partition", min=0, help="only this partition of the topic")]
Change = Callable[[Connection, Target, ActedBy], Awaitable[PauseResult]]


@command(cli, "pause", (*POSTGRES, "wait_"))
def pause(
    app: AppOrName,
    settings: Settings,
    topic: _Topic = None,
    partition: _Partition = None,
    why: NeededWhy = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Settle nothing new of an App, a topic or a partition.

    Workers obey within 5 seconds: what is in flight finishes, nothing else begins. They keep their partitions and stay in the group, and
    other partitions go on. A pause survives restarts and rebalances; `consumer status` shows it. Commands of operators (`dlq retry`,
    `replay --apply`) are not paused.
    """  # fmt: skip
    by = acted_by(operator, why, needs_why=True)
    return _run(app, topic, partition, by, settings, shard, as_json, admin.pause, _print_paused)


@command(cli, "resume", (*POSTGRES, "wait_"))
def resume(
    app: AppOrName,
    settings: Settings,
    topic: _Topic = None,
    partition: _Partition = None,
    why: NeededWhy = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """End the pause of an App, a topic or a partition.

    Ends all pauses within it: without --topic, all of the App. Exit code 1 if a wider pause stays, which is named.
    """
    by = acted_by(operator, why, needs_why=True)
    return _run(app, topic, partition, by, settings, shard, as_json, admin.resume, _print_resumed)


def _run(
    app: str,
    topic: str | None,
    partition: int | None,
    by: ActedBy,
    settings: Settings,
    shard: str | None,
    as_json: bool,
    change: Change,
    print_result: Callable[[PauseResult], None],
) -> Any:
    if partition is not None and topic is None:
        raise Misconfigured("--partition: of no topic; it goes with --topic")
    named = named_app(app)
    target = Target(named.name, topic, partition)
    if named.app is not None and topic is not None:
        named.app.discover([topic])

    async def run(on: Settings) -> int:
        result = await with_ledger(on, lambda connection: _change(connection, named, target, by, change))
        if as_json:
            print_json(result.as_dict())
        is_good = change is admin.pause or not result.left
        if not as_json:
            print_result(result)
        return 0 if is_good else 1

    return over(named.app, shard, settings, as_json, run)


async def _change(connection: Connection, named: NamedApp, target: Target, by: ActedBy, change: Change) -> PauseResult:
    await named.check(connection)
    await admin.check_target(connection, target, named.topics)
    return await change(connection, target, by)


def _print_paused(result: PauseResult) -> None:
    if result.changed:
        line(f"{result.target} of {result.target.app} is paused: workers obey within 5 seconds")
    for pause in result.left:
        shown = pause_as_dict(pause)
        line(f"{pause.target} is paused already, since {shown['since']} by {pause.operator}: {pause.why}")


def _print_resumed(result: PauseResult) -> None:
    for pause in result.changed:
        line(f"{pause.target} of {result.target.app} goes on")
    if result.left:
        wider = "; ".join(f"{pause.target}: {pause.why}" for pause in result.left)
        raise Refused(f"{result.target}: still paused, because a wider pause covers it; resume that one ({wider})")
    if not result.changed:
        line(f"{result.target} of {result.target.app} is not paused; nothing was changed")
