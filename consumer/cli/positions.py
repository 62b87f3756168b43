"""`consumer positions`: show the positions in PostgreSQL, or change some of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from consumer.app_loader import load_app
from consumer.cli import position_actions as actions
from consumer.cli.framework import SERVICES, AppPath, AsJson, cli, command
from consumer.cli.per_shard import ShardName, over
from consumer.cli.status import status_of
from consumer.core.errors import Misconfigured
from consumer.core.suggestions import UnknownName, suggestion
from consumer.settings import Settings

_Topic = Annotated[str | None, typer.Option("--topic", help="the topic to move")]
_Partition = Annotated[
    int | None, typer.Option("--partition", min=0, help="the partition to move (default: all of the topic)")
]
_To = Annotated[
    str | None,
    typer.Option(
        "--move-to",
        help="earliest, latest, committed (the offset that the group has committed in Kafka), an offset, a time such as "
        "2026-11-25T10:00:00Z, or how long ago, such as 90m, 24h or 7d",
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="with --move-to: show what would move, and change nothing")]
_Adopt = Annotated[
    bool,
    typer.Option(
        "--adopt",
        help="the topic was deleted and made anew, or this is another cluster: begin at the beginning of what is there now "
        "(one partition, or all of the topic that stopped for this)",
    ),
]
_ApplyAgain = Annotated[
    bool,
    typer.Option(
        "--apply-again",
        help="with --move-to: go back although message_id= has changed, and apply again what was applied under other ids",
    ),
]
_Handler = Annotated[str | None, typer.Option("--handler", help="with --begin-here and --accept-id-rule: the handler")]
_BeginHere = Annotated[
    bool,
    typer.Option(
        "--begin-here",
        help="record that the handler begins where it is now: what it has missed is left, and no longer reported",
    ),
]
_AcceptIdRule = Annotated[
    bool,
    typer.Option(
        "--accept-id-rule",
        help="record that message_id= of the handler was changed on purpose: stop the workers with the old code first",
    ),
]


@command(cli, "positions", (*SERVICES, "wait_"))
def positions(
    app: AppPath,
    settings: Settings,
    topic: _Topic = None,
    partition: _Partition = None,
    to: _To = None,
    dry_run: _DryRun = False,
    adopt: _Adopt = False,
    apply_again: _ApplyAgain = False,
    handler: _Handler = None,
    begin_here: _BeginHere = False,
    accept_id_rule: _AcceptIdRule = False,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Show the positions in PostgreSQL, or move some; running workers notice and go on from there.

    These count, not the group's offsets in Kafka. Going back applies nothing twice, because the ids are in the ledger;
    it is refused after message_id= of a handler has changed. Going forward skips the messages in between for good.
    --adopt starts new ids for messages that are identified by their offset: copies of old ones would be applied again.
    """
    loaded = load_app(app)
    _check_together(topic, partition, to, handler, dry_run, adopt, apply_again, begin_here, accept_id_rule)
    if handler is not None:
        actions.check_handler(loaded, app, handler)

    async def run(on: Settings) -> int:
        if handler is not None and accept_id_rule:
            return await actions.accept_id_rule(loaded, handler, on, as_json)
        if handler is not None:
            return await actions.begin_here(loaded, handler, topic, on, as_json)
        if topic is None:
            return await status_of(loaded, app, on, as_json)
        if to is None:
            return await actions.adopt(loaded, topic, partition, on, as_json)
        return await actions.move(
            loaded, topic, partition, to, on, dry_run=dry_run, apply_again=apply_again, as_json=as_json
        )

    if topic is not None and topic not in loaded.topics:
        raise UnknownName(f"{app} has no handler of topic {topic!r}; {suggestion(topic, loaded.topics)}")
    return over(loaded, shard, settings, as_json, run)


def _check_together(
    topic: str | None,
    partition: int | None,
    to: str | None,
    handler: str | None,
    dry_run: bool,
    adopt: bool,
    apply_again: bool,
    begin_here: bool,
    accept_id_rule: bool,
) -> None:
    """Raise Misconfigured for options that have no effect together."""
    if adopt and (to is not None or topic is None):
        raise Misconfigured("--adopt goes with --move-topic, and maybe --partition, and without --move-to")
    if accept_id_rule and (
        begin_here or handler is None or adopt or topic is not None or to is not None or partition is not None
    ):
        raise Misconfigured("--accept-id-rule goes with --handler alone")
    if (begin_here or accept_id_rule) != (handler is not None) or (
        begin_here and (adopt or to is not None or partition is not None)
    ):
        raise Misconfigured(
            "--begin-here goes with --handler, and maybe --topic, and without --move-to, --partition and --adopt"
        )
    if (dry_run or apply_again) and to is None:
        raise Misconfigured(f"{'--dry-run' if dry_run else '--apply-again'} goes with --move-to")
    if not adopt and not begin_here and ((topic is None) != (to is None) or (partition is not None and to is None)):
        raise Misconfigured("to move positions, give --topic and --move-to, and --partition for one of them")
