"""Yes-or-no questions that a signal ends at once."""

from __future__ import annotations

import os
import select
import signal
import sys
import typing

import typer

from consumer.cli.signals import Interrupted, signal_handlers_kept


def ask(question: str) -> bool:
    """Ask a yes-or-no question; the default is no.

    Raises Interrupted on Ctrl-C, SIGTERM and at the end of the input. The event loop's own handlers would wait until the
    read returns, so signals end it here.
    """

    def end(number: int, _: object) -> typing.NoReturn:
        raise Interrupted("interrupted at the question: nothing was changed", number)

    with signal_handlers_kept():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        try:
            return _confirmed(question)
        except (EOFError, KeyboardInterrupt):
            raise Interrupted("interrupted at the question: nothing was changed") from None


def _confirmed(question: str) -> bool:
    while True:
        typer.echo(f"{question} [y/N]: ", nl=False, err=True)
        _until_typed()
        match input().strip().lower():
            case "y" | "yes":
                return True
            case "" | "n" | "no":
                return False
            case _:
                typer.echo("Error: invalid input", err=True)


def _until_typed() -> None:
    """Wait until the terminal has a line to read.

    The handler of a signal just before a blocking read would run only after the read. Here a signal also writes to a pipe
    that is waited for, so its handler runs at once.
    """
    if not sys.stdin.isatty():
        return
    wakened, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        while sys.stdin not in select.select([sys.stdin, wakened], [], [])[0]:
            os.read(wakened, 1)  # a signal whose handler raised nothing
    finally:
        signal.set_wakeup_fd(before)
        os.close(wakened)
        os.close(wake)
