"""A small HTTP/1.1 server: GET and HEAD, one request a connection.

It holds nothing that a client sends beyond the head of its request, for a few seconds. Limitations: no TLS, no keep-alive, no
compression; it is for probes and scrapes from the same machine or a private network.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from consumer.core.errors import Misconfigured
from consumer.logs import describe, event

_HEAD_BYTES_MAX = 8192
_REQUEST_SECONDS = 5.0
_CONNECTIONS_MAX = 64

TEXT = "text/plain; charset=utf-8"


class Request(NamedTuple):
    """A request. query: without repeated names. headers: names in lower case."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


class Answer(NamedTuple):
    """An answer to a request."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = TEXT


Route = Callable[[Request], Answer]


def as_text(*lines: str, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    """Return an answer of some lines."""
    return Answer("".join(f"{line}\n" for line in lines).encode(), status)


def address_problem(error: OSError | UnicodeError) -> str:
    """Return why an address cannot be listened on, and what to do."""
    return {
        errno.EADDRINUSE: "the port is in use; end what listens there, or choose another one",
        errno.EACCES: "the port may not be used; choose one above 1023",
    }.get(getattr(error, "errno", None) or 0, "this machine has no such address; choose one of its own, as 127.0.0.1")


class HttpServer:
    """Serves routes by path.

    A route that raises costs one answer. request_seconds: from a connection to the end of its answer. connections_max: at a time;
    more are ended.
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        *,
        request_seconds: float = _REQUEST_SECONDS,
        connections_max: int = _CONNECTIONS_MAX,
    ) -> None:
        self._routes = routes
        self._request_seconds = request_seconds
        self._connections_max = connections_max
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._failed: set[str] = set()  # routes whose failure was logged

    async def open(self, host: str, port: int) -> int:
        """Serve on an address; return the port. Raises Misconfigured.

        port: 0 for one that is free.
        """
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_HEAD_BYTES_MAX)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that is none
            raise Misconfigured(f"CONSUMER_HTTP={host}:{port}: {address_problem(error)}") from None
        port = self._server.sockets[0].getsockname()[1]
        event(logging.INFO, "serving metrics and health", host=host, port=port)
        return port

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._writers)

    def close(self) -> None:
        """Serve nothing more, and end every connection."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.connections >= self._connections_max:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            async with asyncio.timeout(self._request_seconds):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):  # it left, or was too slow; TimeoutError is an OSError
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _encoded(as_text("the request is too long", status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        line, *fields = head.decode("latin-1").split("\r\n")
        method, _, rest = line.partition(" ")
        target, _, version = rest.rpartition(" ")
        if not version.startswith("HTTP/1.") or not target.startswith("/"):
            return _encoded(as_text("not an HTTP/1.1 request", status=HTTPStatus.BAD_REQUEST))
        if method not in ("GET", "HEAD"):
            answer = as_text("only GET and HEAD", status=HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            answer = self._routed(target, fields)
        return _encoded(answer, is_head=method == "HEAD")

    def _routed(self, target: str, fields: list[str]) -> Answer:
        try:
            parts = urlsplit(target)
        except ValueError:
            return as_text("not an HTTP/1.1 request", status=HTTPStatus.BAD_REQUEST)
        route = self._routes.get(parts.path)
        if route is None:
            return as_text(*self._routes, status=HTTPStatus.NOT_FOUND)
        headers = {name.strip().lower(): text.strip() for name, _, text in (field.partition(":") for field in fields)}
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        try:
            return route(Request(parts.path, query, headers))
        except Exception as error:
            if parts.path not in self._failed:
                self._failed.add(parts.path)
                event(logging.ERROR, "a page cannot be served", path=parts.path, error=describe(error))
            return as_text("this page failed; the log says where", status=HTTPStatus.INTERNAL_SERVER_ERROR)


def _encoded(answer: Answer, *, is_head: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n"
    )
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        head += "Allow: GET, HEAD\r\n"
    return head.encode() + b"\r\n" + (b"" if is_head else answer.body)
