"""Print text, tables and JSON without control sequences.

Imports rich; imports no other module of `cli`. Identifiers are never cut, because people paste them into filters.
"""

from __future__ import annotations

import json
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

# emoji: without it ":100:" in topic:100:0 would become one. A pipe has no width at which to wrap.
out = Console(emoji=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 1000)
err = Console(stderr=True, soft_wrap=True, emoji=False)


def fail(text: str, code: int) -> typing.NoReturn:
    """Print one line on standard error and exit.

    The line has no control sequence and no password of an address, whatever the text quotes.
    """
    line = _URL_USER.sub(r"\1***@", printable(" ".join(text.split())))
    err.print(
        f"[bold red]consumer:[/] {escape(line)}" if err.is_terminal else f"consumer: {line}",
        markup=err.is_terminal,
        highlight=False,
    )
    raise typer.Exit(code)


# A user and password, which may hold a slash or an at sign; but not the placeholder in our own hints.
_URL_USER = re.compile(r"(\w+://)(?!user(?::password)?@)\S*@")


def printable(text: str) -> str:
    """Return text for a terminal, with control characters as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def line(text: str) -> None:
    """Print one line on standard output, with control characters as escapes."""
    out.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def numbers(*titles: str) -> list[Column]:
    """Make columns of numbers.

    Not overflow="ignore": rich does not align such cells.
    """
    return [Column(title, justify="right", no_wrap=True, overflow="fold") for title in titles]


def names(*titles: str) -> list[Column]:
    """Make columns of identifiers, which are never cut or wrapped."""
    return [Column(title, no_wrap=True, overflow="ignore") for title in titles]


def show(table: Table, title: str = "") -> None:
    """Print a table, or lines if it is too wide.

    Then each row is printed as lines of `column  value`, so that no identifier is cut.
    """
    if title:
        line(title)
    if Measurement.get(out, out.options.update(width=10_000), table).minimum <= out.width:
        out.print(table)
        return
    titles = [str(column.header) for column in table.columns]
    width = max(map(len, titles))
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        out.print()
        for name, cell in zip(titles, cells, strict=True):
            out.print(f"{name:{width}}  {cell}", highlight=False, soft_wrap=True)


_collected: ContextVar[list[object] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting() -> Iterator[list[object]]:
    """Collect JSON answers instead of printing them, to print them as one."""
    answers: list[object] = []
    token = _collected.set(answers)
    try:
        yield answers
    finally:
        _collected.reset(token)


def print_json(answer: Any) -> None:
    """Print an answer as one JSON document."""
    if (collected := _collected.get()) is not None:
        collected.append(answer)
        return
    print(json.dumps(answer, indent=2, default=str))
