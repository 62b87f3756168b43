"""The `consumer` command: imports the commands and runs one.

Exit codes: 0 a good answer, 1 a bad answer (unknown, not up to date, restarts did not help), 2 it could not start or the
answer is inconclusive. Every error is one line on standard error, without a traceback, which could quote a secret.
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

# Each module registers its commands. `run` imports only its own, so it starts sooner.
_RUN = "run"
_OTHERS = (
    "config",
    "migrate",
    "status",
    "show",
    "positions",
    "diagram",
    "dlq",
    "dlq_settle",
    "dlq_erase",
    "audit",
    "pause",
    "outbox",
    "purge",
    "replay",
    "rebuild",
    "republish",
    "demo",
)


def whole() -> typer.Typer:
    """Import every command; return the complete command line."""
    for module in (_RUN, *_OTHERS):
        importlib.import_module(f"consumer.cli.{module}")
    return cli


def _only_run() -> typer.Typer:
    importlib.import_module(f"consumer.cli.{_RUN}")
    return cli


def main() -> None:
    """Run the command that the arguments name."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the parent process: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - open until the process ends
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
