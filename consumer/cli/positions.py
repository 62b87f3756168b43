"""`consumer positions`: show the positions in PostgreSQL, or change some of them.

admin/position_changes.py decides and acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer

from consumer.admin import position_changes as changes
from consumer.admin.status import gap_as_dict
from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import SERVICES, AppPath, AsJson, DryRun, Refused, cli, command
from consumer.cli.operators import Operator, Why, acted_by
from consumer.cli.output import line, print_json
from consumer.cli.per_shard import ShardName, over
from consumer.cli.status import print_status
from consumer.core.audit import ActedBy
from consumer.core.errors import Misconfigured
from consumer.core.suggestions import UnknownName
from consumer.handler_records.notices import gap_text
from consumer.settings import Settings

_FILTERS, _MOVE, _OTHER = "Filters", "Move", "Other changes"

_Topic = Annotated[
    str | None, typer.Option("--topic", metavar="TOPIC", help="only of this topic", rich_help_panel=_FILTERS)
]
_Partition = Annotated[
    int | None,
    typer.Option("--partition", min=0, help="only this partition of the topic", rich_help_panel=_FILTERS),
]
_Handler = Annotated[
    str | None,
    typer.Option(
        "--handler",
        metavar="NAME",
        help="only of this handler, with --begin-here or --accept-id-rule",
        rich_help_panel=_FILTERS,
    ),
]
_To = Annotated[
    str | None,
    typer.Option(
        "--move-to",
        metavar="BOUND",
        help="earliest, latest, committed (the offset that the group has committed in Kafka), an offset, a time such as "
        "2026-11-25T10:00:00Z, or how long ago, such as 90m, 24h or 7d",
        rich_help_panel=_MOVE,
    ),
]
_ApplyAgain = Annotated[
    bool,
    typer.Option(
        "--apply-again",
        help="go back although message_id= has changed, and apply again what was applied under other ids",
        rich_help_panel=_MOVE,
    ),
]
_Adopt = Annotated[
    bool,
    typer.Option(
        "--adopt",
        help="the topic was deleted and created again, or this is another cluster: begin at the beginning of the present log "
        "(one partition, or all of the topic that stopped for this)",
        rich_help_panel=_OTHER,
    ),
]
_BeginHere = Annotated[
    bool,
    typer.Option(
        "--begin-here",
        help="record that the handler begins where it is now: what it has missed is left, and no longer reported",
        rich_help_panel=_OTHER,
    ),
]
_AcceptIdRule = Annotated[
    bool,
    typer.Option(
        "--accept-id-rule",
        help="record that message_id= of the handler was changed on purpose: stop the workers with the old code first",
        rich_help_panel=_OTHER,
    ),
]


@command(cli, "positions", (*SERVICES, "wait_"))
def positions(
    app: AppPath,
    settings: Settings,
    topic: _Topic = None,
    partition: _Partition = None,
    handler: _Handler = None,
    move_to: _To = None,
    dry_run: DryRun = False,
    apply_again: _ApplyAgain = False,
    adopt: _Adopt = False,
    begin_here: _BeginHere = False,
    accept_id_rule: _AcceptIdRule = False,
    why: Why = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Show the positions in PostgreSQL, or move some.

    Running workers notice and continue from there. These positions count, not the group's offsets in Kafka. Going back
    applies nothing twice, because the ids are in the ledger; it is refused after message_id= of a handler has changed. Going
    forward skips the messages in between for good. --adopt starts new ids for messages that are identified by their offset:
    copies of old ones would be applied again.

    \b
    Examples:
      consumer positions shop:app --topic payments --move-to 24h --dry-run
      consumer positions shop:app --topic payments --adopt
      consumer positions shop:app --handler NEW --begin-here
    """
    loaded = load_app(app)
    by = acted_by(operator, why)
    wanted = _Wanted(topic, partition, handler, move_to, dry_run, apply_again, adopt, begin_here, accept_id_rule, by)
    _check_together(wanted)
    if handler is not None:
        changes.check_handler(loaded, app, handler)
    if topic is not None and not loaded.takes(topic):
        raise UnknownName(f"--topic: {app} has no handler of topic {topic!r}; {loaded.selection.suggestion(topic)}")
    return over(loaded, shard, settings, as_json, lambda on: _run(loaded, app, wanted, on, as_json))


class _Wanted(NamedTuple):
    """The flags of the command."""

    topic: str | None
    partition: int | None
    handler: str | None
    to: str | None
    dry_run: bool
    apply_again: bool
    adopt: bool
    begin_here: bool
    accept_id_rule: bool
    by: ActedBy


def _check_together(wanted: _Wanted) -> None:
    """Raise Misconfigured for flags that have no effect together."""
    topic, partition, handler, to = wanted.topic, wanted.partition, wanted.handler, wanted.to
    if wanted.adopt and (to is not None or topic is None):
        raise Misconfigured(
            "--adopt: not with these flags; --adopt goes with --topic, and maybe --partition, and without --move-to"
        )
    others = [wanted.begin_here, wanted.adopt, topic is not None, to is not None, partition is not None]
    if wanted.accept_id_rule and (handler is None or any(others)):
        raise Misconfigured("--accept-id-rule: not with these flags; --accept-id-rule goes with --handler alone")
    declares = wanted.begin_here or wanted.accept_id_rule
    moves = wanted.adopt or to is not None or partition is not None
    if declares != (handler is not None) or (wanted.begin_here and moves):
        raise Misconfigured(
            "--begin-here: not with these flags; --begin-here goes with --handler, and maybe --topic, and without --move-to, "
            "--partition and --adopt"
        )
    if (wanted.dry_run or wanted.apply_again) and to is None:
        flag = "--dry-run" if wanted.dry_run else "--apply-again"
        raise Misconfigured(f"{flag}: no effect alone; {flag} goes with --move-to")
    is_incomplete = (topic is None) != (to is None) or (partition is not None and to is None)
    if not wanted.adopt and not wanted.begin_here and is_incomplete:
        raise Misconfigured(
            "--move-to: incomplete; to move positions, give --topic and --move-to, and --partition for one of them"
        )


async def _run(app: App, path: str, wanted: _Wanted, settings: Settings, as_json: bool) -> int:
    if wanted.handler is not None and wanted.accept_id_rule:
        return await _accept_id_rule(app, wanted.handler, wanted.by, settings, as_json)
    if wanted.handler is not None:
        return await _begin_here(app, wanted.handler, wanted.topic, wanted.by, settings, as_json)
    if wanted.topic is None:
        return await print_status(app, path, settings, as_json)
    if wanted.to is None:
        return await _adopt(app, wanted.topic, wanted.partition, wanted.by, settings, as_json)
    moves = await changes.move(
        app,
        wanted.topic,
        wanted.partition,
        wanted.to,
        settings,
        dry_run=wanted.dry_run,
        apply_again=wanted.apply_again,
        by=wanted.by,
    )
    _print_moves(moves, wanted.partition is not None, wanted.dry_run, as_json)
    return 0


def _print_moves(moves: Sequence[changes.Move], is_one: bool, dry_run: bool, as_json: bool) -> None:
    if as_json:
        extra = {"dry_run": True} if dry_run else {}
        rows = [move.partition._asdict() | {"before": move.before, "position": move.position} | extra for move in moves]
        print_json(rows[0] if is_one else rows)
        return
    verb = "would move" if dry_run else "moved"
    for (topic, number), before, position in moves:
        line(f"{topic}:{number} {verb} from {'-' if before is None else before} to {position}")


async def _adopt(app: App, topic: str, partition: int | None, by: ActedBy, settings: Settings, as_json: bool) -> int:
    adopted = await changes.adopt(app, topic, partition, settings, by)
    if as_json:
        print_json([place._asdict() | {"why": why} for place, why in adopted])
    else:
        for place, why in adopted:
            line(f"{place.topic}:{place.partition} begins at the beginning of this log ({why})")
    if not adopted:
        raise Refused(
            f"--adopt: nothing to adopt, because the positions of {topic} are of the present topic; nothing was changed"
        )
    return 0


async def _begin_here(app: App, handler: str, topic: str | None, by: ActedBy, settings: Settings, as_json: bool) -> int:
    gaps = await changes.begin_here(app, handler, topic, settings, by)
    if as_json:
        print_json([gap_as_dict(gap) for gap in gaps])
    elif gaps:
        line(f"{handler} begins where it is now: {gap_text(gaps)} are left to the handlers that were there before")
    if not gaps:
        raise Refused(
            f"--begin-here: handler {handler!r} has missed nothing that the ledger knows of; nothing was changed"
        )
    return 0


async def _accept_id_rule(app: App, handler: str, by: ActedBy, settings: Settings, as_json: bool) -> int:
    change = await changes.accept_id_rule(app, handler, settings, by)
    if as_json:
        print_json(None if change is None else change._asdict())
    elif change is not None:
        line(
            f"{handler} identifies its messages by {change.declared} now; the ledger has other ids of those that are settled, so "
            "replay cannot judge them, and positions do not go back to them"
        )
    if change is None:
        raise Refused(
            f"--accept-id-rule: handler {handler!r} identifies its messages as the ledger has it; nothing was changed"
        )
    return 0
