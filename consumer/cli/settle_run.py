"""Settle dead letters from a terminal: ask, show progress, print results.

A first Ctrl-C or SIGTERM lets the transaction in hand end, a second one undoes it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from consumer.admin import name_filters
from consumer.admin.settle_dead_letters import SettleOptions, select, settle
from consumer.admin.settle_result import SettleResult
from consumer.app import App
from consumer.app_loader import running
from consumer.cli.framework import Refused
from consumer.cli.output import line, print_json
from consumer.cli.progress import progress
from consumer.cli.prompts import ask
from consumer.cli.signals import Interrupted
from consumer.core.audit import ActedBy
from consumer.core.errors import CannotTell, Misconfigured
from consumer.dead_letters.retry import DeadLetterRetrier, Filters
from consumer.postgres.connection import wait_for
from consumer.settings import Settings

_NUMBERS_SHOWN_MAX = 200


class Answering(NamedTuple):
    """Who acts, and how to answer."""

    by: ActedBy
    yes: bool
    dry_run: bool
    as_json: bool


async def settle_all(
    app: App, settings: Settings, filters: Filters, options: SettleOptions, answering: Answering
) -> int:
    """Select, confirm and settle; return the exit code."""
    settings.dsn  # noqa: B018 - raises when there is none
    async with running(app):
        by = answering.by
        why = "" if options.is_discard else by.why
        retrier = await wait_for(
            lambda left: DeadLetterRetrier.open(app, settings, by.operator, why), settings.wait_seconds
        )
        try:
            await name_filters.check(
                retrier.session.connection,
                None,
                filters.handler,
                filters.topic,
                filters.group,
                handlers=tuple(app.handlers),
                topics=tuple(app.topics),
            )
            numbers, left_out, question, unsure = await select(retrier, filters, options)
            if answering.dry_run or not numbers:
                return _print_selected(numbers, left_out, answering)
            if question is not None and not answering.yes:
                confirm(question)
            if unsure:
                retrier.allow_unsure()
            return await _settle(retrier, numbers, left_out, options, answering, bulk=filters.dead_letters is None)
        finally:
            retrier.close()


def confirm(question: str) -> None:
    """Ask; raise Misconfigured without a terminal, Refused for no."""
    if not sys.stdin.isatty():
        raise Misconfigured(
            f"{question.removesuffix('?')}: no terminal to ask at; say --yes (--dry-run shows the dead letters)"
        )
    if not ask(question):
        raise Refused("dead letters: the answer was no; nothing was changed")


def _print_selected(numbers: Sequence[int], left_out: int, answering: Answering) -> int:
    if answering.as_json:
        print_json(SettleResult(len(numbers), left_out).as_dict(None, changed=False, selected=numbers))
        return 0
    more = " …" if len(numbers) > _NUMBERS_SHOWN_MAX else ""
    listed = ", ".join(map(str, numbers[:_NUMBERS_SHOWN_MAX])) + more
    line(f"{len(numbers):,} dead letters{': ' if numbers else ''}{listed}")
    _print_left_out(left_out)
    return 0


def _print_left_out(count: int) -> None:
    if count:
        line(
            f"{count:,} dead letters are left out: they may have been applied already (too_old). Look at the handler's own "
            "tables, then name them with --reason too_old"
        )


def _print_result(result: SettleResult, bulk: bool) -> None:
    shown, more = result.shown(bulk)
    for entry in shown:
        behind = " (it waited behind)" if entry.behind else ""
        text = f": {entry.text[:200]}" if entry.text else ""
        line(f"{entry.dead_letter}{behind} {entry.outcome}{text}")
    if more:
        line(f"… and {more:,} more: consumer dlq list APP")
    line(result.counted())
    _print_left_out(result.left_out)


async def _settle(
    retrier: DeadLetterRetrier,
    numbers: Sequence[int],
    left_out: int,
    options: SettleOptions,
    answering: Answering,
    *,
    bulk: bool,
) -> int:
    result = SettleResult(len(numbers), left_out)
    received = _stop_on_signals(retrier)
    is_complete = False
    error = ""
    try:
        with progress("dead letters") as bar:
            phase = "discarding" if options.is_discard else "retrying"
            async for settled in settle(retrier, numbers, options):
                result.add(settled)
                bar.progress(phase, min(result.reached, len(numbers)), len(numbers))
        is_complete = not received
    except (CannotTell, asyncio.CancelledError) as fault:
        error = str(fault)
    if received:
        word = "interrupted" if received[0] == signal.SIGINT else "terminated"
        error = (
            f"{word} after {result.total:,} dead letters of {len(numbers):,} asked for: {result.counted()}; the rest is "
            "untouched, and the same command goes on with it"
        )
    elif not is_complete:
        error = (
            f"{error or 'interrupted'} (after {result.reached:,} of {len(numbers):,} dead letters: {result.counted()}; what was "
            "settled stays so)"
        )
    if answering.as_json:
        print_json(result.as_dict(error or None))
    elif is_complete:
        _print_result(result, bulk)
    if received:
        raise Interrupted(error, received[0])
    if not is_complete:
        raise CannotTell(error)
    return 0 if result.is_good(bulk) else 1


def _stop_on_signals(retrier: DeadLetterRetrier) -> list[int]:
    """Stop after the transaction in hand on a signal.

    A second one cancels the transaction.

    Returns the signals that were received, which grows.
    """
    received: list[int] = []
    task = asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if received:
            task.cancel()  # the transaction is undone, unless it is on its way to be committed
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    retrier.stopping = lambda: bool(received)
    return received
