"""What every request passes: host, operator, origin and token.

It also sets the headers of every answer. A request that is refused reaches no page. The body of a form is read here, with a
limit, because its token is in it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from consumer.console.auth import Auth, AuthFailed
from consumer.console.tokens import FIELD, FormTokens, is_same_origin
from consumer.logs import event

_BODY_BYTES_MAX = 2 << 20  # the largest payload that is edited in a page, encoded
_FIELDS_MAX = 2000
HEADERS = {
    # No inline style and no inline script; nothing of another host.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # not no-referrer: then a browser would send `Origin: null`
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
Form = Mapping[str, tuple[str, ...]]


class Refused(Exception):
    """A request that is not answered. status: of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """An ASGI application around the pages.

    The pages find the operator's name in `scope["operator"]`, and the fields of a POST in `scope["form"]`.
    """

    def __init__(self, pages: ASGIApp, auth: Auth, tokens: FormTokens, hosts: frozenset[str] | None) -> None:
        self._pages = pages
        self._auth = auth
        self._tokens = tokens
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope, receive)
        try:
            scope["operator"] = await self._admitted(request)
            if request.method not in ("GET", "HEAD"):
                scope["form"] = await self._form(request, scope["operator"])
        except Refused as refused:
            await PlainTextResponse(f"{refused}\n", refused.status)(scope, receive, with_headers)
            return
        with suppress(Exception):  # it is answered and logged; the server would log its text and traceback
            await self._pages(scope, receive, with_headers)

    async def _admitted(self, request: Request) -> str:
        """Return the operator. Raises Refused."""
        if self._hosts is not None and request.headers.get("host", "").lower() not in self._hosts:
            raise Refused(421, "this host name is not served here; use the address that the console printed")
        try:
            operator = await self._auth.operator(request)
        except AuthFailed as error:
            event(logging.ERROR, "the function that names operators failed", error=str(error))
            raise Refused(
                500, "it cannot be checked who you are: the function of --auth failed; the log says where"
            ) from None
        if operator is None:
            raise Refused(401, "it is not known who you are; log in at the proxy in front of this console")
        return operator

    async def _form(self, request: Request, operator: str) -> Form:
        """Return the fields of a form of ours. Raises Refused."""
        if request.method != "POST":
            raise Refused(405, "only GET, HEAD and POST")
        if not is_same_origin(request.headers.get("origin"), request.headers.get("host")):
            raise Refused(403, "the form comes from another site; open the page here, and send it again")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
            raise Refused(415, "not a form")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _BODY_BYTES_MAX:
                raise Refused(413, "the form is too large; use the command for such a payload")
        try:
            pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_FIELDS_MAX)
        except ValueError:
            raise Refused(400, "the form cannot be read") from None
        fields: dict[str, tuple[str, ...]] = {}
        for name, text in pairs:
            fields[name] = (*fields.get(name, ()), text)
        if not self._tokens.is_valid(operator, (fields.get(FIELD) or ("",))[0]):
            raise Refused(
                403, "the form is of an earlier run of the console, or of another operator; load the page again"
            )
        return fields
