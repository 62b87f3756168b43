"""The `consumer` command. Turns arguments into calls and answers into text; decides nothing.

Exit codes: 0 a good answer, 1 the answer is no (unknown, not up to date, restarts did not help), 2 it could not start or
could not tell. Every error is one line on standard error, without a traceback, which would quote what the error quotes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from consumer.cli import interrupts
from consumer.cli.framework import cli

# Each module registers its commands. `run` imports only its own, and starts sooner.
_RUN = "run"
_OTHERS = (
    "migrate",
    "status",
    "show",
    "positions",
    "diagram",
    "dlq",
    "dlq_settle",
    "purge",
    "replay",
    "rebuild",
    "republish",
    "demo",
)


def whole() -> typer.Typer:
    """Import every command; returns the complete command line."""
    for module in (_RUN, *_OTHERS):
        importlib.import_module(f"consumer.cli.{module}")
    return cli


def _only_run() -> typer.Typer:
    importlib.import_module(f"consumer.cli.{_RUN}")
    return cli


def main() -> None:
    """Entry of the command."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by who started us: else the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    interrupts.end_at_once()
    (_only_run() if sys.argv[1:2] == [_RUN] else whole())(prog_name="consumer")


def _version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("idempotent-consumer"))
        raise typer.Exit(0)


@cli.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Consume Kafka topics with each message's effects applied exactly once."""
