"""What every command shares: its settings as flags, its errors as one line, its answers as text that drives no terminal.

Knows typer and rich; knows no command. Exit codes: 0 a good answer, 1 the answer is no, 2 it could not start or could not
tell, 130 and 143 a signal.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import re
import select
import signal
import sys
import time
import typing
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from consumer import logs
from consumer.cli.help_text import Command, heading_of, metavar_of
from consumer.core.errors import ConsumerError, Misconfigured
from consumer.kafka.errors import KafkaError
from consumer.postgres.connection import connect, database_epoch, translated_errors, wait_for
from consumer.postgres.errors import redacted_message, sqlstate_of
from consumer.settings import Settings, load
from consumer.worker.event_loop import run as run_loop

cli = typer.Typer(
    name="consumer",
    help="Consume Kafka topics with each message's effects applied exactly once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of flags and variables that they should teach
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every setting is also an environment variable: CONSUMER_ and its name, as shown beside it.",
)
dlq = typer.Typer(
    help="Dead letters: messages that could not be applied, kept with their bytes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
cli.add_typer(dlq, name="dlq")

# emoji: partition 100 is no emoji. Piped, nothing is cut.
out = Console(emoji=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 1000)
err = Console(stderr=True, soft_wrap=True, emoji=False)

AppPath = Annotated[str, typer.Argument(metavar="APP", help='the App, as "module:attribute"', show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

POSTGRES = ("postgres_dsn", "postgres_ca_file", "postgres_pooler", "allow_insecure")
SERVICES = ("kafka_", *POSTGRES)
_TELL_SECONDS = 5.0  # between two lines of progress where there is no terminal for a bar
_SHORT = {"grace_seconds": "--grace", "wait_seconds": "--wait"}


class Refused(Exception):
    """The answer is no."""


class Interrupted(ConsumerError):
    """A signal ended the command early. The text says how far it came."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.code = 128 + number


def ask(question: str) -> bool:
    """Ask a person yes or no; the default is no. Raises Interrupted on Ctrl-C, SIGTERM and at the end of the input.

    The event loop's own handlers would wait until the read returns, so signals end it here.
    """

    def end(number: int, _: object) -> typing.NoReturn:
        raise Interrupted("interrupted at the question: nothing was changed", number)

    with _signal_handlers_kept():
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, end)
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
        typer.echo("Error: invalid input", err=True)


def _until_typed() -> None:
    """Wait until the terminal has a line, so that the read after it returns at once.

    A signal just before a blocking read would run its handler only after the read. Here it writes to a pipe that is waited
    for too, so its handler runs at once.
    """
    if not sys.stdin.isatty():
        return
    wakened, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        while sys.stdin not in select.select([sys.stdin, wakened], [], [])[0]:
            os.read(wakened, 1)  # a signal whose handler has raised nothing
    finally:
        signal.set_wakeup_fd(before)
        os.close(wakened)
        os.close(wake)


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM at the end of the block."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)


async def _until_signal(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a command; SIGINT and SIGTERM cancel it. Raises Interrupted in place of whatever it raised then.

    A command that handles signals itself replaces these handlers for as long as it does.
    """
    task = asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await coroutine
    except (Interrupted, typer.Exit):
        raise
    except (asyncio.CancelledError, Exception) as error:
        if not received:
            raise
        word = "interrupted" if received[0] == signal.SIGINT else "terminated"
        text = str(error) if isinstance(error, ConsumerError) else ""
        raise Interrupted(
            text if text.startswith(("interrupted", "terminated")) else f"{word}{f': {text}' if text else ''}",
            received[0],
        ) from None


def command(
    app: typer.Typer, name: str, settings: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """A command whose settings (all whose names begin with one of `settings`) are flags, and whose errors are one line."""

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        own = [
            each for each in inspect.signature(function, eval_str=True).parameters.values() if each.name != "settings"
        ]
        fields = (
            {each: field for each, field in Settings.model_fields.items() if each.startswith(settings)}
            if settings
            else {}
        )

        @functools.wraps(function)
        def call(**given: Any) -> None:
            flags = {each: given.pop(each) for each in fields}
            try:
                _check_text({**given, **flags})
                if "settings" in inspect.signature(function).parameters:
                    given["settings"] = own_settings = load(**flags)
                    logs.configure(own_settings.log_level, own_settings.log_format, config=own_settings.log_config)
                result = function(**given)
                if inspect.iscoroutine(result):
                    with _signal_handlers_kept():  # at its end the loop sets those that Python begins with
                        result = run_loop(_until_signal(result))
            except Interrupted as stopped:
                fail(str(stopped), stopped.code)
            except typer.Exit:
                raise
            except Refused as refused:
                fail(str(refused), 1)
            except ConsumerError as error:
                fail(str(error), 2)
            except (KafkaError, TimeoutError) as error:
                fail(f"Kafka: {str(error) or type(error).__name__}", 2)
            except (KeyboardInterrupt, typer.Abort):
                fail("interrupted", 130)
            except asyncio.CancelledError:
                fail("terminated", 143)
            except BrokenPipeError:
                raise typer.Exit(1) from None
            except Exception as error:
                # Not foreseen, so its text is not known to be fit to print; that it is no answer is certain.
                fail(f"{name}: {logs.describe(error)}{_sqlstate(error)}", 2)
            else:
                raise typer.Exit(result or 0)

        options = [_option(each, field) for each, field in fields.items()]
        call.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in [*own, *options]}
        app.command(name, cls=Command)(call)
        return call

    return register


_AS_BYTES = ("key", "message_id", "id")  # arguments that may hold bytes that are not UTF-8


def _check_text(given: dict[str, Any]) -> None:
    """Raise Misconfigured for an argument that is no text in UTF-8: neither PostgreSQL nor Kafka would take it."""
    for name, value in given.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and name not in _AS_BYTES and any("\ud800" <= c <= "\udfff" for c in each):
                raise Misconfigured(f"{_flag_of(name)}: not valid UTF-8; write it in UTF-8")


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option(name: str, field: Any) -> inspect.Parameter:
    kinds = [each for each in typing.get_args(field.annotation) or (field.annotation,) if each is not type(None)]
    if typing.get_origin(field.annotation) is typing.Literal or any(
        typing.get_origin(each) is typing.Literal for each in kinds
    ):
        kind: Any = str
        choices = typing.get_args(field.annotation)
        text = f"{field.description}: {', '.join(map(str, choices))}"
    else:
        kind = str if SecretStr in kinds else kinds[0]
        while typing.get_origin(kind) is Annotated:
            kind = typing.get_args(kind)[0]
        text = field.description or ""
    flag = f"--{name.replace('_', '-')}"
    flags = [flag, f"--no-{flag[2:]}"] if kind is bool else [flag]
    if name in _SHORT:
        flags.insert(0, _SHORT[name])
    declaration = "/".join(flags) if kind is bool else None
    option = typer.Option(
        *([declaration] if declaration else flags),
        help=text,
        metavar=None if kind is bool else metavar_of(name, kind),
        show_default=False,
        rich_help_panel=heading_of(name),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _sqlstate(error: BaseException) -> str:
    code = sqlstate_of(error)
    return f" (SQLSTATE {code}: {redacted_message(error)})" if code else ""


def fail(text: str, code: int) -> typing.NoReturn:
    # Whatever is quoted in it: one line, no control sequences, no password of an address.
    line = _URL_USER.sub(r"\1***@", printable(" ".join(text.split())))
    err.print(
        f"[bold red]consumer:[/] {escape(line)}" if err.is_terminal else f"consumer: {line}",
        markup=err.is_terminal,
        highlight=False,
    )
    raise typer.Exit(code)


# A user and password, which may hold a slash or an at sign; but not what our own hints say in their place.
_URL_USER = re.compile(r"(\w+://)(?!user(?::password)?@)\S*@")


def printable(text: str) -> str:
    """Text for a terminal: what could drive it is shown as an escape."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )


async def connected(settings: Settings) -> Any:
    """Connect, and wait for PostgreSQL as long as --wait allows."""
    return await wait_for(lambda left: connect(settings, left), settings.wait_seconds)


async def with_ledger(settings: Settings, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    """What `ask` finds on a connection to a ledger of this version. Raises Misconfigured, ServiceUnavailable."""
    connection = await connected(settings)
    try:
        with translated_errors(settings):
            await database_epoch(connection, settings)
        return await ask(connection)  # its errors may be Kafka's: they are not taken for PostgreSQL's
    finally:
        connection.terminate()


def right(*names: str) -> list[Any]:
    """Columns of numbers."""
    return [Column(name, justify="right", overflow="fold") for name in names]


def names(*names: str) -> list[Any]:
    """Columns of names and numbers that people paste into a filter: never cut, never broken over lines."""
    return [Column(name, no_wrap=True, overflow="ignore") for name in names]


def show(table: Table) -> None:
    """Print a table; where it does not fit, each row as lines of `column  value`, so that no name is cut."""
    if Measurement.get(out, out.options.update(width=10_000), table).minimum <= out.width:
        out.print(table)
        return
    if table.title:
        out.print(table.title, highlight=False, soft_wrap=True)
    titles = [str(column.header) for column in table.columns]
    width = max(map(len, titles))
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        out.print()
        for title, cell in zip(titles, cells, strict=True):
            out.print(f"{title:{width}}  {cell}", highlight=False, soft_wrap=True)


class Bar:
    """Progress with rate and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bars: Progress | None, unit: str) -> None:
        self._bars = bars
        self._unit = unit
        self._tasks: dict[str, Any] = {}
        self._begun_at = self._told_at = time.monotonic()
        self._first: dict[str, tuple[float, int]] = {}

    def line(self, text: str) -> None:
        """Something that a person should know."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)

    def announce(self, text: str) -> None:
        """Print a line on standard error, with a terminal or without."""
        if self._bars is not None:
            self.line(text)
        else:
            err.print(f"consumer: {printable(text)}", markup=False, highlight=False)

    def progress(self, phase: str, done: int, total: int) -> None:
        """So much of a phase is done."""
        now = time.monotonic()
        at, before = self._first.setdefault(phase, (now, done))
        rate = (done - before) / (now - at) if now - at > 0.5 else 0.0
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, rate="")
            self._bars.update(self._tasks[phase], completed=done, total=total, rate=f"{rate:,.0f}/s" if rate else "")
        elif now - self._told_at > _TELL_SECONDS:
            self._told_at = now
            left = f", {(total - done) / rate:,.0f} s left" if rate else ""
            err.print(
                f"consumer: {phase}: {done:,} of {total:,} {self._unit} ({done / max(total, 1):.0%}), {rate:,.0f}/s{left}",
                markup=False,
                highlight=False,
            )


@contextmanager
def progress(unit: str) -> Iterator[Bar]:
    """Progress of the block on standard error, counted in `unit`."""
    if not err.is_terminal:
        yield Bar(None, unit)
        return
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        yield Bar(bars, unit)


_collected: ContextVar[list[object] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting() -> Iterator[list[object]]:
    """Keep what would be printed as JSON, to make one answer of several."""
    found: list[object] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def print_json(found: object) -> None:
    if (collected := _collected.get()) is not None:
        collected.append(found)
        return
    print(json.dumps(found, indent=2, default=str))
