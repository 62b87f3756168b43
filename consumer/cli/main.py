"""The `consumer` command: imports the commands and runs one.

Exit codes: 0 a good answer, 1 a bad answer (unknown, not up to date, restarts did not help), 2 it could not start or the
answer is inconclusive. Every error is one line on standard error, without a traceback, which could quote a secret.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from consumer.cli import interrupts
from consumer.cli.framework import cli

# Each module registers its commands.
_MODULES = (
    "run",
    "new",
    "config",
    "produce",
    "tail",
    "migrate",
    "status",
    "show",
    "positions",
    "diagram",
    "asyncapi",
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
    "console",
    "demo",
)
# Of commands that are not in the one module of their name.
_MODULES_OF = {
    "dlq": ("dlq", "dlq_settle", "dlq_erase"),
    "probe": ("status",),
    "resume": ("pause",),
}


def whole() -> typer.Typer:
    """Import every command; return the complete command line."""
    return _with(_MODULES)


def only(name: str) -> typer.Typer:
    """Import what one command needs, so that it starts sooner.

    Everything for a name that is none.
    """
    return _with(_MODULES_OF.get(name) or ((name,) if name in _MODULES else _MODULES))


def _with(modules: Sequence[str]) -> typer.Typer:
    for module in modules:
        importlib.import_module(f"consumer.cli.{module}")
    return cli


def main() -> None:
    """Run the command that the arguments name."""
    interrupts.end_at_once()
    command = only(sys.argv[1] if len(sys.argv) > 1 else "")
    gc.freeze()  # modules stay: to look for garbage in them, at the end once more, takes a fifth of a short command
    gc.enable()
    command(prog_name="consumer")


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata  # slow

        print(importlib.metadata.version("idempotent-consumer"))
        raise typer.Exit(0)


@cli.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Consume Kafka topics with each message's effects applied exactly once."""
