"""`consumer dlq list` and `dlq show`, and the filters of dead letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer.admin import report
from consumer.cli import name_filters
from consumer.cli.framework import POSTGRES, AppOrName, AsJson, command, dlq
from consumer.cli.ledger_access import with_ledger
from consumer.cli.output import names, out, print_json, printable, right, show
from consumer.cli.per_shard import NamedApp, ShardName, named_app, over
from consumer.core.dead_letters import DeadLetterState, age_seconds
from consumer.core.errors import Misconfigured
from consumer.core.outcome import Reason
from consumer.core.suggestions import UnknownName, check_known
from consumer.dead_letters.retry import Filters
from consumer.settings import Settings

_OPEN = (DeadLetterState.DEAD.value, DeadLetterState.WAITING.value)

_FILTERS = "Filters"


@dataclass(frozen=True, kw_only=True)
class FilterFlags:
    """Filters of dead letters."""

    handler: Annotated[str | None, typer.Option("--handler", help="only of this handler", rich_help_panel=_FILTERS)] = (
        None
    )
    topic: Annotated[str | None, typer.Option("--topic", help="only from this topic", rich_help_panel=_FILTERS)] = None
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
        """Return the filters. Raises Misconfigured for an unknown reason or a wrong age."""
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
        str, typer.Option("--state", help=f"open (dead or waiting), all, {', '.join(DeadLetterState)}")
    ] = "open",
    by_group: Annotated[bool, typer.Option("--by-group", help="count them by kind of error instead")] = False,
    actions: Annotated[
        bool, typer.Option("--actions", help="list actions on dead letters instead: what was done, by whom")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="the newest so many")] = 50,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """List the newest dead letters, without their payloads.

    A dead letter is dead (an operator must decide), waiting (behind another of its key), applied (by a retry) or discarded.
    A filter that names what does not exist is an error (exit code 2), not an empty answer.
    """
    states = {"open": _OPEN, "all": None, **{each.value: (each.value,) for each in DeadLetterState}}
    check_known("--state", state, states, "this command")
    filters = only.filters()
    wanted = states["all"] if actions and state == "open" else states[state]
    named = named_app(app)
    select = report.actions_of if actions else report.letter_groups if by_group else report.dead_letters
    print_rows = _list_actions if actions else _list_groups if by_group else _list_letters

    async def run(on: Settings) -> int:
        rows = await with_ledger(on, lambda connection: _selected(connection, named, filters, select, limit, wanted))
        if as_json:
            print_json(rows)
        else:
            print_rows(rows)
        return 0

    return over(named.app, shard, settings, as_json, run)


async def _selected(
    connection: Any, app: NamedApp, only: Filters, select: Any, limit: int, states: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Check the filters against the database, and query."""
    await app.check(connection)
    await name_filters.check(
        connection, app.name, only.handler, only.topic, only.group, handlers=app.handlers, topics=app.topics
    )
    rows: list[dict[str, Any]] = await select(
        connection,
        app.name,
        only.handler,
        only.topic,
        only.reason,
        limit,
        group=only.group,
        states=states,
        older_than_seconds=only.older_than_seconds,
        newer_than_seconds=only.newer_than_seconds,
    )
    return rows


def _list_actions(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*names("at", "letter", "who", "what", "outcome"), "note")
    for each in rows:
        table.add_row(
            each["at"][:19],
            str(each["letter"]),
            escape(printable(each["operator"])),
            each["what"],
            each["outcome"],
            escape(printable(each["note"][:80])),
        )
    _print(table, "no actions")


def _list_letters(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *names("letter", "app", "handler", "from", "state", "reason", "group"),
        "error",
        *right("attempts"),
        *names("died at"),
    )
    for each in rows:
        table.add_row(
            str(each["letter"]),
            escape(printable(each["app"])),
            escape(printable(each["handler"])),
            escape(f"{each['topic']}:{each['partition']}:{each['offset']}"),
            each["state"],
            each["reason"],
            each["group"] or "-",
            escape(printable(each["error"][:80])),
            str(each["attempts"]),
            each["died_at"][:19],
        )
    _print(table, "no dead letters")


def _list_groups(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        *names("group"), *right("letters"), *names("app", "handler", "reason"), "kind", *names("letter"), "for example"
    )
    for each in rows:
        table.add_row(
            each["group"] or "-",
            f"{each['count']:,}",
            escape(printable(each["app"])),
            escape(printable(each["handler"])),
            each["reason"],
            escape(printable(each["kind"])),
            str(each["letter"]),
            escape(printable(each["error"][:80])),
        )
    _print(table, "no dead letters")


def _print(table: Table, nothing: str) -> None:
    if table.row_count:
        show(table)
    else:
        out.print(nothing)


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
        raise Misconfigured("each shard numbers its dead letters itself: select one with --shard NAME")
    return over(named.app, shard, settings, as_json, lambda on: _dlq_show(named, letter, on, as_json))


async def _dlq_show(app: NamedApp, number: int, settings: Settings, as_json: bool) -> int:
    async def ask(connection: Any) -> dict[str, Any] | None:
        await app.check(connection)
        return await report.dead_letter(connection, number)

    found = await with_ledger(settings, ask)
    if found is None or found["app"] != app.name:
        raise UnknownName(f"no dead letter {number} of App {app.name!r}; see `consumer dlq list APP --state all`")
    if as_json:
        print_json(found)
        return 0
    actions = found.pop("actions")
    trace = found.pop("trace")
    altered = found.pop("altered")
    for name, value in found.items():
        out.print(
            f"{name:18} {printable(value) if isinstance(value, str) else json.dumps(value)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if altered:
        text = f"not as its message had it: {' and '.join(altered)}; `consumer dlq retry` does not apply it as it is"
        out.print(f"{'altered':18} {text}", markup=False, highlight=False, soft_wrap=True)
    for n, frame in enumerate(trace):
        out.print(f"{'' if n else 'trace':18} {printable(frame)}", markup=False, highlight=False, soft_wrap=True)
    for each in reversed(actions):
        line = f"{each['at'][:19]} {each['what']} by {each['operator']}: {each['outcome']}"
        line += f", as {each['new_id']}" if each["new_id"] else ""
        line += f" ({each['note']})" if each["note"] else ""
        out.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    return 0
