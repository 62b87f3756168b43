"""`consumer dlq list` and `dlq show`, and the filters of dead letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer.admin import dead_letters, name_filters
from consumer.admin.ledger_access import with_ledger
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, command, dlq
from consumer.cli.output import line, names, numbers, print_json, printable, show
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.dead_letters import DeadLetterState, age_seconds
from consumer.core.errors import Misconfigured
from consumer.core.outcome import Reason
from consumer.core.suggestions import UnknownName, check_known
from consumer.dead_letters.retry import Filters
from consumer.postgres.protocol import Connection
from consumer.settings import Settings

_OPEN = (DeadLetterState.DEAD.value, DeadLetterState.WAITING.value)

_FILTERS = "Filters"


@dataclass(frozen=True, kw_only=True)
class FilterFlags:
    """Filters of dead letters."""

    handler: Annotated[
        str | None, typer.Option("--handler", metavar="NAME", help="only of this handler", rich_help_panel=_FILTERS)
    ] = None
    topic: Annotated[
        str | None, typer.Option("--topic", metavar="TOPIC", help="only of this topic", rich_help_panel=_FILTERS)
    ] = None
    reason: Annotated[
        str | None,
        typer.Option("--reason", help=f"only for this reason: {', '.join(Reason)}", rich_help_panel=_FILTERS),
    ] = None
    group: Annotated[
        str | None,
        typer.Option("--group", help="only of this error group, as `dlq list` shows it", rich_help_panel=_FILTERS),
    ] = None
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="only stored before: 10m, 24h, 7d", rich_help_panel=_FILTERS),
    ] = None
    newer_than: Annotated[
        str | None,
        typer.Option("--newer-than", metavar="AGE", help="only stored since: 10m, 24h, 7d", rich_help_panel=_FILTERS),
    ] = None

    def filters(self, letters: list[int] | None = None) -> Filters:
        """Return the filters.

        Raises Misconfigured for an unknown reason and for text that is no age.
        """
        if self.reason is not None:
            check_known("--reason", self.reason, list(Reason), "this command")
        return Filters(
            tuple(dict.fromkeys(letters)) if letters else None,
            self.handler,
            self.topic,
            self.reason,
            self.group,
            None if self.older_than is None else age_seconds(self.older_than, "--older-than"),
            None if self.newer_than is None else age_seconds(self.newer_than, "--newer-than"),
        )


@command(dlq, "list", (*POSTGRES, "wait_"))
def dlq_list(
    app: AppOrName,
    settings: Settings,
    only: FilterFlags,
    state: Annotated[
        str,
        typer.Option(
            "--state", help=f"open (dead or waiting), all, {', '.join(DeadLetterState)}", rich_help_panel=_FILTERS
        ),
    ] = "open",
    by_group: Annotated[
        bool, typer.Option("--by-group", help="count them by kind of error instead", rich_help_panel="Answer")
    ] = False,
    actions: Annotated[
        bool,
        typer.Option(
            "--actions", help="list actions on dead letters instead: what was done, by whom", rich_help_panel="Answer"
        ),
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="the newest so many")] = 50,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """List the newest dead letters, without their payloads.

    A dead letter is dead (an operator must decide), waiting (behind another of its key), applied (by a retry) or discarded.
    A filter that names what does not exist is an error (exit code 2), not an empty answer.
    """
    states = {"open": _OPEN, "all": None, **{known.value: (known.value,) for known in DeadLetterState}}
    check_known("--state", state, states, "this command")
    filters = only.filters()
    wanted_states = states["all"] if actions and state == "open" else states[state]
    named = named_app(app)
    select, print_rows = _answer(by_group, actions)

    async def run(on: Settings) -> int:
        rows = await with_ledger(on, lambda connection: _rows(connection, named, filters, select, limit, wanted_states))
        if as_json:
            print_json(rows)
        else:
            print_rows(rows)
        return 0

    return over(named.app, shard, settings, as_json, run)


async def _rows(
    connection: Connection, app: NamedApp, filters: Filters, select: Any, limit: int, states: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Check the filters against the database, and query."""
    await app.check(connection)
    await name_filters.check(
        connection, app.name, filters.handler, filters.topic, filters.group, handlers=app.handlers, topics=app.topics
    )
    rows: list[dict[str, Any]] = await select(
        connection,
        app.name,
        filters.handler,
        filters.topic,
        filters.reason,
        limit,
        group=filters.group,
        states=states,
        older_than_seconds=filters.older_than_seconds,
        newer_than_seconds=filters.newer_than_seconds,
    )
    return rows


def _answer(by_group: bool, actions: bool) -> tuple[Any, Any]:
    """Choose the query and the table."""
    if actions:
        return dead_letters.actions, print_actions
    return (dead_letters.error_groups, print_groups) if by_group else (dead_letters.dead_letters, print_dead_letters)


def print_actions(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*names("at", "letter", "who", "what", "outcome"), "note")
    for row in rows:
        table.add_row(
            row["at"][:19],
            str(row["letter"]),
            escape(printable(row["operator"])),
            row["what"],
            row["outcome"],
            escape(printable(row["note"][:80])),
        )
    _print(table, "no actions")


def print_dead_letters(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *names("letter", "app", "handler", "from", "state", "reason", "group"),
        "error",
        *numbers("attempts"),
        *names("died at"),
    )
    for row in rows:
        table.add_row(
            str(row["letter"]),
            escape(printable(row["app"])),
            escape(printable(row["handler"])),
            escape(f"{row['topic']}:{row['partition']}:{row['offset']}"),
            row["state"],
            row["reason"],
            row["group"] or "-",
            escape(printable(row["error"][:80])),
            str(row["attempts"]),
            row["died_at"][:19],
        )
    _print(table, "no dead letters")


def print_groups(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *names("group"), *numbers("letters"), *names("app", "handler", "reason", "kind", "letter"), "for example"
    )
    for row in rows:
        table.add_row(
            row["group"] or "-",
            f"{row['count']:,}",
            escape(printable(row["app"])),
            escape(printable(row["handler"])),
            row["reason"],
            escape(printable(row["kind"])),
            str(row["letter"]),
            escape(printable(row["error"][:80])),
        )
    _print(table, "no dead letters")


def _print(table: Table, nothing: str) -> None:
    if table.row_count:
        show(table)
    else:
        line(nothing)


@command(dlq, "show", (*POSTGRES, "wait_"))
def dlq_show(
    app: AppOrName,
    letter: Annotated[
        int,
        typer.Argument(
            metavar="LETTER",
            min=1,
            max=2**63 - 1,
            help="its number, as `consumer dlq list` shows it",
            show_default=False,
        ),
    ],
    settings: Settings,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Show a dead letter with its bytes, headers and actions."""
    named = named_app(app)
    if named.app is not None and named.app.shards and shard is None:
        raise Misconfigured("--shard: each shard numbers its dead letters itself; select one with --shard NAME")
    return over(named.app, shard, settings, as_json, lambda on: _dlq_show(named, letter, on, as_json))


async def _dlq_show(app: NamedApp, number: int, settings: Settings, as_json: bool) -> int:
    async def ask(connection: Connection) -> dict[str, Any] | None:
        await app.check(connection)
        return await dead_letters.dead_letter(connection, number)

    answer = await with_ledger(settings, ask)
    if answer is None or answer["app"] != app.name:
        raise UnknownName(
            f"LETTER: no dead letter {number} of App {app.name!r}; see `consumer dlq list APP --state all`"
        )
    if as_json:
        print_json(answer)
    else:
        _print_dead_letter(answer)
    return 0


def _print_dead_letter(answer: dict[str, Any]) -> None:
    for name, value in answer.items():
        if name not in ("actions", "trace", "altered", "erased"):
            line(f"{name:18} {value if isinstance(value, str) else json.dumps(value)}")
    if answer["erased"]:
        line(f"{'erased':18} its message, its errors and its edits; it can be discarded, and not retried")
    if altered := answer["altered"]:
        line(
            f"{'altered':18} not as its message had it: {' and '.join(altered)}; `consumer dlq retry` does not apply it as it is"
        )
    for n, frame in enumerate(answer["trace"]):
        line(f"{'' if n else 'trace':18} {frame}")
    for action in reversed(answer["actions"]):
        text = f"{action['at'][:19]} {action['what']} by {action['operator']}: {action['outcome']}"
        text += f", as {action['new_id']}" if action["new_id"] else ""
        text += f" ({action['note']})" if action["note"] else ""
        line(text)
