"""Print text, tables and JSON without control sequences.

Imports rich; imports no other command module.
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

# emoji: partition 100 is no emoji. Piped, nothing is cut.
out = Console(emoji=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 1000)
err = Console(stderr=True, soft_wrap=True, emoji=False)


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
    """Return text for a terminal, control characters as escapes."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )


def right(*names: str) -> list[Any]:
    """Columns of numbers."""
    return [Column(name, justify="right", overflow="fold") for name in names]


def names(*names: str) -> list[Any]:
    """Columns of names, which are never cut or wrapped.

    People paste them into filters.
    """
    return [Column(name, no_wrap=True, overflow="ignore") for name in names]


def show(table: Table) -> None:
    """Print a table, or lines where it is too wide.

    Then each row is printed as lines of `column  value`, so that no name is cut.
    """
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


_collected: ContextVar[list[object] | None] = ContextVar("collected", default=None)


@contextmanager
def collecting() -> Iterator[list[object]]:
    """Collect JSON answers instead of printing them, to print them as one."""
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
