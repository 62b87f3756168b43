"""`consumer console`: serve pages for operators, in a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.app import App
from consumer.app_loader import load_app
from consumer.cli.framework import SERVICES, AppPath, cli, command
from consumer.cli.output import line
from consumer.console.options import LISTEN, ConsoleOptions
from consumer.core.errors import Misconfigured
from consumer.settings import Settings

_PARTS = ("starlette", "jinja2", "uvicorn")


@command(cli, "console", (*SERVICES, "dead_letter_topic", "redis_", "console_", "wait_", "log_"))
def console(
    app: AppPath,
    settings: Settings,
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="where to serve the pages")] = LISTEN,
    actions: Annotated[
        bool,
        typer.Option("--actions", help="allow changes: retry, edit, discard, pause, resume; without it, read-only"),
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(
            "--auth",
            metavar="HOW",
            help='who asks: "proxy" (its header X-Forwarded-User) or "module:callable"; needed where other machines reach it',
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--reports", metavar="DIRECTORY", help="show the answers of `consumer replay --json` that are in it"
        ),
    ] = None,
) -> Any:
    """Serve pages for operators: partitions, handlers, dead letters.

    Reads what `consumer status`, `dlq`, `outbox` and `audit` read, and with --actions does what they do, under the operator's name. It answers only
    this machine, unless --auth says who asks. It is a process of its own: workers do not notice it. Needs the extra console.
    """  # fmt: skip
    options = ConsoleOptions(listen=listen, actions=actions, auth=auth, reports=directory)
    options.address(settings)
    loaded = load_app(app)
    settings.dsn  # noqa: B018 - raises when there is none
    return _serve(loaded, app, settings, options)


async def _serve(app: App, path: str, settings: Settings, options: ConsoleOptions) -> int:
    try:
        from consumer.console.context import Console
        from consumer.console.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PARTS:
            raise
        raise Misconfigured("console: the extra is not installed; pip install 'idempotent-consumer[console]'") from None
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await serve(Console(app, path, settings, options), _announce, stopping)
    return 0


def _announce(address: str) -> None:
    line(f"the console is {address} (Ctrl-C ends it)")
    sys.stdout.flush()
