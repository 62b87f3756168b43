"""`make shop`: runs the services, a worker and the page.

On Ctrl-C all of it ends and is removed. Knows arguments, one port and signals. Reachable from this machine only: there
is no login.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

try:
    import uvicorn
except ImportError:  # pragma: no cover - the tests install it
    sys.exit("shop: the page needs an extra: pip install 'idempotent-consumer[shop]', or run `make shop`")

from consumer.core.errors import ConsumerError
from handlers.shop.guard import Guard
from handlers.shop.pages import Page, application
from handlers.shop.running import Running, running

HOST = "127.0.0.1"
PORT = 8080
_END_SECONDS = 3


class _Server(uvicorn.Server):
    """A server that leaves signals to us.

    uvicorn would raise them again at its end, before the services have ended.
    """

    def capture_signals(self) -> Any:
        return nullcontext()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns the exit code: 0 after Ctrl-C or SIGTERM, 2 when it cannot start.
    """
    options = _parser().parse_args(arguments)
    try:
        listener = _listener(options.port)
    except OSError as error:
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({os.strerror(error.errno or 0)})"
        print(
            f"shop: port {options.port} of {HOST} {why}: choose another one with --port N, or --port 0 for a free one",
            file=sys.stderr,
        )
        return 2
    try:
        with listener:
            asyncio.run(_run(listener, options.token_seconds, options.json))
    except ConsumerError as error:
        print(f"shop: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m handlers.shop",
        description="A payment page on which a second tap is stopped, layer by layer, and each layer can be switched off. "
        "Starts PostgreSQL, Valkey, a Kafka broker and a worker on free ports of this machine; Ctrl-C ends them and removes "
        "their directories.",
        epilog="With make: make shop ARGS='--port 8081'",
    )
    parser.add_argument(
        "--port", type=_port, default=os.environ.get("SHOP_PORT", str(PORT)),
        help=f"of the page on {HOST}; 0: a free one (default {PORT}, or SHOP_PORT)",
    )  # fmt: skip
    parser.add_argument(
        "--token-seconds", type=_seconds, default=3600.0, help="how long a token is good for (default 3600)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the addresses of page and services as one line of JSON, with the password of this PostgreSQL",
    )
    return parser


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds, from 0.1 to 86400")
    return seconds


def _listener(port: int) -> socket.socket:
    """The page's socket, taken before anything is started. Raises OSError."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(128)  # who comes while the services start waits
    except BaseException:
        listener.close()
        raise
    return listener


async def _run(listener: socket.socket, token_seconds: float, as_json: bool) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    port = listener.getsockname()[1]
    _report("starting PostgreSQL, Valkey, a Kafka broker and a worker on this machine", as_json)
    async with running() as services:
        page = Page(services, token_seconds)
        async with page.connected():
            hosts = frozenset({f"{HOST}:{port}", f"localhost:{port}", *([HOST, "localhost"] if port == 80 else [])})
            config = uvicorn.Config(
                Guard(application(page), hosts),
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_END_SECONDS,
            )
            server = _Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            stopped = asyncio.create_task(stopping.wait())
            _report(f"the page is http://{HOST}:{port}   (Ctrl-C ends it)", as_json, services, port)
            await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            page.stopping.set()
            server.should_exit = True
            _report("ending: worker, page, services", as_json)
            await serving


def _report(text: str, as_json: bool, services: Running | None = None, port: int = 0) -> None:
    if not as_json:
        print(text, flush=True)
    elif services is not None:
        status = {
            "page": f"http://{HOST}:{port}",
            "postgres_dsn": services.settings.dsn,
            "redis_url": services.valkey.url,
            "kafka_bootstrap_servers": services.tansu.bootstrap_servers,
            "pids": {server.name: server.pid for server in (services.postgres, services.valkey, services.tansu)},
        }
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    sys.exit(main())
