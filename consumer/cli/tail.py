"""`consumer tail`: follow topics, and what became of their messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from consumer.admin.produce import readers
from consumer.admin.tail import Shown, Tail, TailOptions, time_of
from consumer.app_loader import load_app
from consumer.cli.framework import SERVICES, AppPath, AsJson, cli, command
from consumer.cli.output import err, line, printable
from consumer.core.errors import Misconfigured
from consumer.core.message_state import HandlerState, State
from consumer.settings import Settings

_RANGE = "Range"


@dataclass(frozen=True, kw_only=True)
class TailFlags:
    """Which messages to show."""

    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="BOUND",
            help="latest, earliest, position, an offset, a time (2026-11-25T10:00Z; UTC without a zone), or 24h for a day ago",
            rich_help_panel=_RANGE,
        ),
    ] = "latest"
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="BOUND",
            help="end there instead of following: latest, position, an offset, a time, or 10m ago",
            rich_help_panel=_RANGE,
        ),
    ] = None
    last: Annotated[
        int | None,
        typer.Option("--last", "-n", min=1, max=100_000, help="begin with the last so many", rich_help_panel=_RANGE),
    ] = None
    partitions: Annotated[
        list[int] | None,
        typer.Option("--partition", min=0, help="only this partition (may be repeated)", rich_help_panel=_RANGE),
    ] = None
    key: Annotated[str | None, typer.Option("--key", help="only messages with this key", rich_help_panel=_RANGE)] = None


@command(cli, "tail", (*SERVICES, "schema_registry_", "wait_", "log_"))
def tail(
    app: AppPath,
    settings: Settings,
    flags: TailFlags,
    topics: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TOPIC...]", help="by default all that the App reads", show_default=False),
    ] = None,
    with_values: Annotated[
        bool,
        typer.Option("--values", help="show headers and values too, which may be secret", rich_help_panel="Answer"),
    ] = False,
    as_json: AsJson = False,
) -> Any:
    """Follow topics: each message, and what became of it.

    A line has time, place (topic:partition:offset), key, message id, and
    for each handler of the topic what the ledger says: applied, duplicate
    (of another record with the id), dead-lettered, waiting (for another
    attempt, or behind a dead letter), discarded, skipped (idempotent=False),
    unsettled (no worker has settled it), or unknown (the ledger does not
    hold it, though the position has passed it). A new message is shown once
    it is settled, or a second later.

    Changes nothing: joins no group, commits no offset, and shows committed
    messages only. Topics and partitions that are added while it runs are
    not shown. Ctrl-C ends it.

    \b
    Examples:
      consumer tail shop:app
      consumer tail shop:app payments -n 20 --until latest --values
      consumer tail shop:app payments --from 1h --key 7 --json
    """
    loaded = load_app(app)
    wanted = tuple(dict.fromkeys(topics or ()))
    for topic in wanted:
        readers(loaded, app, topic)
    if flags.last is not None and (flags.start != "latest" or flags.key is not None):
        raise Misconfigured("--last: not with --from or --key, which choose other messages; give one of them")
    if flags.last is not None and flags.until not in (None, "latest"):
        raise Misconfigured("--last: only with --until latest, or without; leave --until out")
    if flags.until is not None and flags.last is None and flags.start == "latest":
        raise Misconfigured(
            "--until: nothing is shown, since it begins at the end; say where to begin with --from or -n"
        )
    options = TailOptions(
        topics=wanted,
        start=flags.start,
        until=flags.until,
        last=flags.last,
        partitions=tuple(flags.partitions or ()),
        key=None if flags.key is None else flags.key.encode("utf-8", "surrogateescape"),
        values=with_values,
    )
    return _run(Tail(loaded, settings, options), options, as_json)


async def _run(following: Tail, options: TailOptions, as_json: bool) -> int:
    def show(messages: Sequence[Shown]) -> None:
        for message in messages:
            if as_json:
                print(json.dumps(message.as_dict(options.values), separators=(",", ":")), flush=True)
            else:
                _print(message, options.values)

    def announce(text: str) -> None:
        err.print(f"consumer: {printable(text)}", markup=False, highlight=False)

    try:
        await following.run(show, announce)
    except asyncio.CancelledError:
        if options.until is not None:
            raise
    return 0  # Ctrl-C is how following ends


def _print(message: Shown, with_values: bool) -> None:
    record = message.record
    at = time_of(record.timestamp)
    time = f"timestamp={record.timestamp}" if at is None else f"{at:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
    parts = [time, f"{record.topic}:{record.partition}:{record.offset}"]
    if record.key is not None:
        parts.append(f"key={_text(record.key)}")
    if message.id is not None:
        parts.append(f"id={message.id}")
    states = ", ".join(f"{state.handler} {_state(state)}" for state in message.handlers)
    line("  ".join([*parts, *([states] if states else [])]))
    if with_values:
        for name, value in record.headers:
            line(f"    {name}: {'null' if value is None else _text(value)}")
        line(f"    {'null' if message.value is None else _text(message.value)}")


def _state(state: HandlerState) -> str:
    match state.state:
        case State.DUPLICATE:
            return f"duplicate of {state.first}"
        case State.DEAD_LETTERED | State.DISCARDED:
            return f"{state.state} ({state.reason}, dead letter {state.letter})"
        case State.WAITING if state.letter is not None:
            return f"waiting behind a dead letter (as dead letter {state.letter})"
        case State.WAITING:
            return f"waiting (attempts: {state.attempts})"
        case State.UNSETTLED if state.problem is not None:
            return f"unsettled ({state.problem})"
        case _:
            return str(state.state)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
