"""`consumer dlq`: listing, showing, retrying, editing and discarding dead letters. Arguments to calls, answers to text.

Knows the terminal; decides nothing (redrive.py does). A first Ctrl-C lets the letter in hand come to its end, a second one undoes
it. Exit codes: 0 all that was asked for is settled, 1 something is not, 2 bad input or a service away, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from consumer import report, terminal
from consumer.app import App
from consumer.core.errors import CannotTell, Misconfigured, ServiceUnavailable
from consumer.core.letters import State, age_seconds
from consumer.core.outcome import Reason
from consumer.ledger import Outage
from consumer.loading import load_app, running
from consumer.redrive import Done, Edit, Filters, Redrive, edit_of
from consumer.settings import Settings
from consumer.shard_command import ShardName, ShardsOf, over
from consumer.shards import settings_of
from consumer.terminal import (
    POSTGRES,
    AppPath,
    AsJson,
    Refused,
    command,
    dlq,
    out,
    print_json,
    printable,
    right,
    with_ledger,
)

_SHOWN_MAX = 20  # letters of a bulk action that went wrong, a line each
_OPEN = (State.DEAD.value, State.WAITING.value)

OfHandler = Annotated[str | None, typer.Option("--handler", help="only of this handler")]
OfTopic = Annotated[str | None, typer.Option("--topic", help="only from this topic")]
ForReason = Annotated[str | None, typer.Option("--reason", help=f"only for this reason: {', '.join(Reason)}")]
OfGroup = Annotated[str | None, typer.Option("--group", help="only of this error group, as `dlq list` shows it")]
OlderThan = Annotated[
    str | None, typer.Option("--older-than", metavar="AGE", help="only that died before: 10m, 24h, 7d")
]
NewerThan = Annotated[
    str | None, typer.Option("--newer-than", metavar="AGE", help="only that died since: 10m, 24h, 7d")
]
All = Annotated[bool, typer.Option("--all", help="all open letters of the App")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask before a bulk action")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="tell which letters are meant, and change nothing")]
Operator = Annotated[
    str | None, typer.Option("--operator", help="who does it, for the record (default: the user of the system)")
]
Letters = Annotated[
    list[int] | None,
    typer.Argument(metavar="[LETTER]...", min=1, max=2**63 - 1, help="numbers, as `consumer dlq list` shows them", show_default=False),
]  # fmt: skip


@command(dlq, "list", (*POSTGRES, "wait_"))
def dlq_list(
    settings: Settings,
    app: Annotated[str | None, typer.Option("--app", help="only of the App with this name")] = None,
    handler: OfHandler = None,
    topic: OfTopic = None,
    reason: ForReason = None,
    group: OfGroup = None,
    state: Annotated[str, typer.Option("--state", help=f"open (dead or waiting), all, {', '.join(State)}")] = "open",
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    by_group: Annotated[bool, typer.Option("--by-group", help="count them by kind of error instead")] = False,
    actions: Annotated[bool, typer.Option("--actions", help="what was done to letters, by whom, instead")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="the newest so many")] = 50,
    shards_of: ShardsOf = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """The newest dead letters, without their payloads.

    A letter is dead (somebody must decide), waiting (behind a dead one of its key), applied (by a retry) or discarded.
    """
    states = {"open": _OPEN, "all": None, **{each.value: (each.value,) for each in State}}
    if state not in states:
        raise Misconfigured(f"--state {state[:40]!r}: one of {', '.join(states)}")
    found = _filters(None, handler, topic, reason, group, older_than, newer_than)
    return over(
        shards_of,
        shard,
        settings,
        as_json,
        lambda on: _dlq_list(on, app, found, states[state], limit, by_group=by_group, actions=actions, as_json=as_json),
    )


async def _dlq_list(
    settings: Settings,
    app: str | None,
    only: Filters,
    states: Sequence[str] | None,
    limit: int,
    *,
    by_group: bool,
    actions: bool,
    as_json: bool,
) -> int:
    if actions:
        done = await with_ledger(settings, lambda c: report.actions(c, None, limit))
        if as_json:
            print_json(done)
            return 0
        table = Table("at", "letter", "who", "what", "outcome", "note")
        for each in done:
            note = escape(printable(each["note"][:80]))
            table.add_row(each["at"][:19], str(each["dead_letter"]), escape(printable(each["operator"])), each["what"], each["outcome"], note)  # fmt: skip
        out.print(table if done else "no actions")
        return 0
    found = await with_ledger(
        settings,
        lambda c: report.dead_letters(
            c,
            app,
            only.handler,
            only.topic,
            only.reason,
            2**31 if by_group else limit,
            group=only.group,
            states=states,
            older_than_seconds=only.older_than_seconds,
            newer_than_seconds=only.newer_than_seconds,
        ),
    )
    if by_group:
        return _list_groups(found, as_json)
    if as_json:
        print_json(found)
        return 0
    if not found:
        out.print("no dead letters")
        return 0
    table = Table("number", "app/handler", "from", "state", "reason", "group", "error", *right("attempts"), "died at")
    for each in found:
        table.add_row(
            str(each["dead_letter"]),
            escape(f"{each['app']}/{each['handler']}"),
            f"{each['topic']}:{each['partition']}:{each['offset']}",
            each["state"],
            each["reason"],
            each["error_group"] or "-",
            escape(printable(each["error"][:80])),
            str(each["attempts"]),
            each["died_at"][:19],
        )
    out.print(table)
    return 0


def _list_groups(found: list[dict[str, Any]], as_json: bool) -> int:
    groups: dict[str, dict[str, Any]] = {}
    for each in reversed(found):  # the oldest first, so that the example is the first of its kind
        group = groups.setdefault(
            each["error_group"] or "-",
            {
                "error_group": each["error_group"],
                "app": each["app"],
                "handler": each["handler"],
                "reason": each["reason"],
                "kind": each["kind"],
                "count": 0,
                "example": each["dead_letter"],
                "error": each["error"],
            },
        )
        group["count"] += 1
    rows = sorted(groups.values(), key=lambda each: -each["count"])
    if as_json:
        print_json(rows)
        return 0
    table = Table("group", *right("letters"), "app/handler", "reason", "kind", "for example")
    for each in rows:
        example = f"{each['example']}: {printable(each['error'][:80])}"
        name = f"{each['app']}/{each['handler']}"
        table.add_row(each["error_group"] or "-", f"{each['count']:,}", escape(name), each["reason"], escape(printable(each["kind"])), escape(example))  # fmt: skip
    out.print(table if rows else "no dead letters")
    return 0


@command(dlq, "show", (*POSTGRES, "wait_"))
def dlq_show(
    number: Annotated[
        int,
        typer.Argument(
            metavar="NUMBER", min=1, max=2**63 - 1, help="as `consumer dlq list` shows it", show_default=False
        ),
    ],
    settings: Settings,
    shards_of: ShardsOf = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """One dead letter, with its bytes and headers, and what was done to it."""
    if shards_of is not None and shard is None:
        raise Misconfigured("each shard has numbers of its own: say which one with --shard NAME")
    return over(shards_of, shard, settings, as_json, lambda on: _dlq_show(number, on, as_json))


async def _dlq_show(number: int, settings: Settings, as_json: bool) -> int:
    found = await with_ledger(settings, lambda connection: report.dead_letter(connection, number))
    if found is None:
        raise Refused(f"no dead letter {number}: see `consumer dlq list`")
    if as_json:
        print_json(found)
        return 0
    actions = found.pop("actions")
    for name, value in found.items():
        out.print(
            f"{name:18} {printable(value) if isinstance(value, str) else json.dumps(value)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for each in reversed(actions):
        line = f"{each['at'][:19]} {each['what']} by {each['operator']}: {each['outcome']}"
        line += f", as {each['new_id']}" if each["new_id"] else ""
        line += f" ({each['note']})" if each["note"] else ""
        out.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    return 0


# -- settling them ----------------------------------------------------------------------------------------------------


@command(dlq, "retry", (*POSTGRES, "dead_letter_topic", "wait_", "log_"))
def dlq_retry(
    app: AppPath,
    settings: Settings,
    letters: Letters = None,
    handler: OfHandler = None,
    topic: OfTopic = None,
    reason: ForReason = None,
    group: OfGroup = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    value: Annotated[
        str | None,
        typer.Option("--value", metavar="FILE", help="run ONE letter with this payload instead (- is standard input)"),
    ] = None,
    same_id: Annotated[
        bool, typer.Option("--same-id", help="with --value: it is the same intent, under the same message id")
    ] = False,
    new_id: Annotated[
        str | None,
        typer.Option(
            "--new-id",
            metavar="ID",
            help="with --value: it is another intent, under this message id (auto: one made of the letter)",
        ),
    ] = None,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Run the handlers of dead letters again, here, each in one transaction, and then those that wait behind them.

    A message keeps its id, so its effects count once, whoever else retries it, and whatever comes again from Kafka. One that fails
    again stays a dead letter with one attempt more, and those behind it go on waiting.

    \b
    Examples:
      consumer dlq retry shop:app 17
      consumer dlq retry shop:app --group 5f2a90c1de --yes      all of one kind of error
      consumer dlq retry shop:app --handler settle --older-than 1h --dry-run
      consumer dlq retry shop:app 17 --value mended.json --same-id
    """  # fmt: skip
    edit = _edit(letters, value, same_id, new_id)
    only = _filters(letters, handler, topic, reason, group, older_than, newer_than)
    _named(only, everything)
    return _settle(*_place(app, settings, shard), only, operator, yes, dry_run, as_json, edit=edit)


@command(dlq, "discard", (*POSTGRES, "dead_letter_topic", "wait_", "log_"))
def dlq_discard(
    app: AppPath,
    settings: Settings,
    letters: Letters = None,
    why: Annotated[
        str | None, typer.Option("--why", metavar="TEXT", help="the reason, for the record (required)")
    ] = None,
    handler: OfHandler = None,
    topic: OfTopic = None,
    reason: ForReason = None,
    group: OfGroup = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    everything: All = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    operator: Operator = None,
    shard: ShardName = None,
    as_json: AsJson = False,
) -> Any:
    """Settle dead letters without applying them: their messages never will be. Then those that wait behind them run, here.

    The letter stays as a trace, with who did it and why, and what comes again under its id is a duplicate.
    """
    if why is None or not why.strip():
        raise Misconfigured("--why TEXT: say why these messages are not to be applied; it is kept with them")
    only = _filters(letters, handler, topic, reason, group, older_than, newer_than)
    _named(only, everything)
    return _settle(*_place(app, settings, shard), only, operator, yes, dry_run, as_json, why=why.strip())


def _place(path: str, settings: Settings, shard: str | None) -> tuple[App, Settings]:
    """The App, and the settings with the address of the database whose letters are meant."""
    app = load_app(path)
    by_shard = settings_of(app, settings)
    if app.shards and shard is None:
        raise Misconfigured(f"each shard has letters of its own: say which with --shard ({', '.join(by_shard)})")
    if shard is not None and shard not in app.shards:
        raise Misconfigured(f"{app.name!r} has no shard {shard[:40]!r} (it has: {', '.join(app.shards) or 'none'})")
    return app, by_shard[shard or ""]


def _filters(
    letters: list[int] | None,
    handler: str | None,
    topic: str | None,
    reason: str | None,
    group: str | None,
    older_than: str | None,
    newer_than: str | None,
) -> Filters:
    if reason is not None and reason not in list(Reason):
        raise Misconfigured(f"--reason {reason[:40]!r}: one of {', '.join(Reason)}")
    return Filters(
        tuple(dict.fromkeys(letters)) if letters else None,
        handler,
        topic,
        reason,
        group,
        None if older_than is None else age_seconds(older_than, "--older-than"),
        None if newer_than is None else age_seconds(newer_than, "--newer-than"),
    )


def _named(only: Filters, everything: bool) -> None:
    """Raise Misconfigured unless it is clear which letters are meant."""
    narrowed = only != Filters(only.letters)
    if [only.letters is not None, narrowed, everything].count(True) != 1:
        raise Misconfigured(
            "name letters by number, or by filters (--handler, --reason, --group …), or say --all: one of the three"
        )


def _edit(letters: list[int] | None, value: str | None, same_id: bool, new_id: str | None) -> Edit | None:
    if value is None:
        if same_id or new_id is not None:
            raise Misconfigured("--same-id and --new-id go with --value FILE")
        return None
    if letters is None or len(letters) != 1:
        raise Misconfigured("--value goes with exactly one letter")
    if same_id == (new_id is not None):
        raise Misconfigured(
            "--value: choose --same-id (the same intent, mended: it stays one message, under its id) or --new-id ID (another intent: the "
            "letter is discarded, and this one is applied once, under that id)"
        )
    if new_id == "":
        raise Misconfigured("--new-id: an id, not empty")
    try:
        found = sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()
    except OSError as error:
        raise Misconfigured(f"--value {value}: {error.strerror or error}") from None
    return edit_of(letters[0], found, new_id)


async def _settle(
    app: App,
    settings: Settings,
    only: Filters,
    operator: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
    *,
    why: str | None = None,
    edit: Edit | None = None,
) -> int:
    settings.dsn  # noqa: B018 - raises when there is none
    if only.handler is not None and only.handler not in app.handlers and why is None:
        raise Misconfigured(f"{app.name!r} has no handler {only.handler[:80]!r} (it has: {', '.join(app.handlers)})")
    async with running(app):
        drive = await _opened(app, settings, operator)
        try:
            numbers = await _chosen(drive, only, waiting=why is not None)
            if dry_run or not numbers:
                return _dry(numbers, as_json)
            if only.letters is None and not yes:
                _ask(len(numbers), "discard" if why is not None else "retry")
            return await _each(drive, numbers, why, edit, as_json, bulk=only.letters is None)
        finally:
            drive.close()


async def _opened(app: App, settings: Settings, operator: str | None) -> Redrive:
    clock = asyncio.get_running_loop().time
    deadline = clock() + settings.wait_seconds
    while True:
        try:
            return await Redrive.open(app, settings, operator or _user())
        except Outage as error:
            if clock() + 0.5 > deadline:
                raise ServiceUnavailable(f"{error} (waited {settings.wait_seconds:g} s)") from None
            await asyncio.sleep(0.5)


async def _chosen(drive: Redrive, only: Filters, *, waiting: bool) -> list[int]:
    if only.letters is None:
        return await drive.select(only, waiting=waiting)
    await drive.check(only.letters, waiting=waiting)
    return list(only.letters)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _ask(count: int, what: str) -> None:
    if not sys.stdin.isatty():
        raise Misconfigured(
            f"{what} {count:,} letters: say --yes, since nobody can be asked here (--dry-run shows them)"
        )
    if not typer.confirm(f"{what} {count:,} letters?", err=True):
        raise Refused("nothing was changed")


def _dry(numbers: Sequence[int], as_json: bool) -> int:
    if as_json:
        print_json({"letters": numbers, "changed": False})
        return 0
    named = ", ".join(map(str, numbers[:200])) + (" …" if len(numbers) > 200 else "")
    out.print(
        f"{len(numbers):,} letters{': ' if numbers else ''}{named}", markup=False, highlight=False, soft_wrap=True
    )
    return 0


async def _each(
    drive: Redrive, numbers: Sequence[int], why: str | None, edit: Edit | None, as_json: bool, *, bulk: bool
) -> int:
    results: list[Done] = []
    reached = 0
    stopping = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        if stopping.is_set():
            task.cancel()  # the transaction is undone, unless it is on its way to be committed
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        with terminal.progress("letters") as bar:
            async for done, place in _run(drive, numbers, why, edit):
                if done is not None:
                    results.append(done)
                reached = place
                bar.progress("discarding" if why is not None else "retrying", reached, len(numbers))
                if stopping.is_set():
                    break
    except (CannotTell, asyncio.CancelledError) as error:
        far = f"after {reached:,} of {len(numbers):,} letters: {_counted(results)}; what was settled stays so, and nothing is half done"
        if as_json:
            _print(results, numbers, str(error) or "interrupted")
        raise CannotTell(f"{str(error) or 'interrupted'} ({far})") from None
    interrupted = stopping.is_set() and reached < len(numbers)
    if as_json:
        _print(results, numbers, "interrupted" if interrupted else None)
    else:
        _say(results, bulk)
    if interrupted:
        raise_ = f"interrupted after {reached:,} of {len(numbers):,} letters: {_counted(results)}; the same command goes on with the rest"
        terminal.fail(raise_, 130)
    elsewhere = ("taken", "settled", "behind") if bulk else ()
    return 0 if all(each.is_good or each.outcome in elsewhere for each in results) else 1


async def _run(
    drive: Redrive, numbers: Sequence[int], why: str | None, edit: Edit | None
) -> AsyncIterator[tuple[Done | None, int]]:
    """What became of each letter, and how many of those asked for are behind us."""
    if why is None:
        for place, number in enumerate(numbers):
            async for done in drive.retry(number, edit):
                yield done, place
            yield None, place + 1
        return
    # First all that are meant, then what waited behind them: or a letter would run that is about to be discarded.
    chains: dict[tuple[int, bytes], None] = {}
    for place, number in enumerate(numbers, 1):
        done, chain = await drive.discard(number, why)
        if chain is not None:
            chains[chain] = None
        yield done, place
    for chain in chains:
        async for done in drive.release(chain):
            yield done, len(numbers)


def _counted(results: Sequence[Done]) -> str:
    counts = Counter(each.outcome for each in results)
    return ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common()) or "nothing was changed"


def _print(results: Sequence[Done], numbers: Sequence[int], error: str | None) -> None:
    print_json(
        {
            "asked": len(numbers),
            "counts": dict(Counter(each.outcome for each in results)),
            "letters": [
                {"dead_letter": each.dead_letter, "outcome": each.outcome, "text": each.text, "behind": each.behind}
                for each in results
            ],
            "error": error,
        }
    )


def _say(results: Sequence[Done], bulk: bool) -> None:
    told = [each for each in results if not (bulk and each.is_good)]
    for each in told[:_SHOWN_MAX]:
        behind = " (it waited behind)" if each.behind else ""
        text = f": {each.text[:200]}" if each.text else ""
        out.print(
            printable(f"{each.dead_letter}{behind} {each.outcome}{text}"), markup=False, highlight=False, soft_wrap=True
        )
    if len(told) > _SHOWN_MAX:
        out.print(f"… and {len(told) - _SHOWN_MAX:,} more: consumer dlq list")
    out.print(_counted(results), markup=False, highlight=False)
