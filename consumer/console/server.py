"""Serves the console until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn

from consumer.console.auth import auth_of
from consumer.console.context import Console
from consumer.console.options import ConsoleOptions
from consumer.console.routes import application
from consumer.core.errors import Misconfigured
from consumer.logs import event
from consumer.monitoring.http_server import address_problem

_END_SECONDS = 3
_CONNECTIONS_MAX = 200


class _Server(uvicorn.Server):
    """A server that leaves signals to the command."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


async def serve(console: Console, announce: Callable[[str], Any], stopping: asyncio.Event) -> None:
    """Serve until `stopping` is set. announce: receives the address.

    Raises Misconfigured for an address that cannot be used, and for a function of --auth that does not work.
    """
    options = console.options
    host, port = options.address(console.settings)
    auth = await auth_of(options.auth, console.settings)
    with _listener(host, port, options) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(
            application(console, auth, options.hosts(host, port)),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # the peer is who connects: --auth proxy relies on it
            limit_concurrency=_CONNECTIONS_MAX,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        server = _Server(config)
        async with console.watching():
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            stopped = asyncio.create_task(stopping.wait())
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            event(logging.INFO, "serving the console", host=host, port=port, actions=options.actions)
            announce(address)
            try:
                await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopped.cancel()
                server.should_exit = True
                await asyncio.wait([serving], timeout=_END_SECONDS + 2)


def _listener(host: str, port: int, options: ConsoleOptions) -> socket.socket:
    """Return the listening socket. Raises Misconfigured."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        return listener
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise Misconfigured(f"--listen {options.listen}: {address_problem(error)}") from None
