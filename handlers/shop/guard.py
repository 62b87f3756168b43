"""The checks of every request, and the headers of every answer.

Knows ASGI and headers. There is no proxy in front, and the server is bound to this machine. So only another site in the
same browser can send requests: by form, by script, or by a name that it points here. Limitations: it does not know who
the visitor is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from consumer.schemes.web import Problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

BODY_BYTES_MAX = 8 * 1024
_BODY_SECONDS = 10.0
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",  # also what Back shows is asked for again
}


class Guard:
    """ASGI middleware.

    hosts: the names, with port, under which this server may be reached.
    """

    def __init__(self, app: App, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), v.encode()) for n, v in _HEADERS.items() if n.encode() not in present),
                ]
            await send(message)

        request = Request(scope, receive)
        try:
            self._check(request)
            if scope["method"] not in _SAFE:
                receive = await _buffered(request, receive)
        except Problem as problem:
            await Response(problem.body, problem.status_code, problem.headers)(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "").lower()
        if host not in self._hosts:
            raise Problem(400, "host_unknown", f"This server is {' or '.join(sorted(self._hosts))}.")
        if request.method in _SAFE:
            return
        # A browser always says where a POST comes from. What says nothing is no browser, and has no visitor's cookie.
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site")
        if (origin is not None and origin.lower() != f"http://{host}") or site not in (None, "same-origin", "none"):
            raise Problem(403, "origin_foreign", "This request comes from another site.")


async def _buffered(request: Request, receive: Receive) -> Receive:
    """The body, read up to its limit. Raises Problem: 413, 400, 408."""
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Problem(400, "length_invalid", "Content-Length is a number.")
    too_large = Problem(413, "body_too_large", f"A body has at most {BODY_BYTES_MAX} bytes.")
    if len(length) > 9 or int(length) > BODY_BYTES_MAX:
        raise too_large
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return receive
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > BODY_BYTES_MAX:
                    raise too_large
    except TimeoutError:
        raise Problem(408, "body_slow", "The body did not come in time.") from None
    bodies = [body]

    async def replayed() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return replayed
