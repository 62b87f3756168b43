"""Reads and redeems a token of a web request, with HTTP answers.

Knows Starlette (and so FastAPI) and `Tokens`; the one file that needs the extra `web`. What it does not know: whether
the endpoint's message has reached Kafka.

================  ======================================  ===========================================================
status            when                                    why this one
================  ======================================  ===========================================================
428               no token                                RFC 6585: the request must be conditional. (The IETF draft
                                                          idempotency-key-header-07 says 400, which says less.)
422               malformed                               the server understood and cannot process it (RFC 9110)
422               unknown or expired                      not 410: that speaks of the address, and caches may keep it
422               used before for another payload         as the draft says
403               of another subject                      a new token will not help, another login would
409, Retry-After  used before, and no answer yet          as the draft and Stripe say: the first one is at work
the first one's   used before, and answered               as the draft and Stripe say, with Stripe's header
                                                          ``Idempotent-Replayed: true``
503, Retry-After  Redis does not answer                   nothing was published; the same token may be sent again (another
                                                          process may answer it with 409 for `again_after_seconds`)
================  ======================================  ===========================================================

All are problem+json (RFC 9457) with a member ``code`` for programs, and none holds the token.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any, assert_never

from consumer.logs import event
from consumer.schemes.redis_call import RedisAway
from consumer.schemes.tokens import RESULT_BYTES_MAX, Foreign, Fresh, OtherPayload, Tokens, Unknown, Used

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response
except ImportError as error:  # pragma: no cover - the tests install it
    raise ImportError("consumer.schemes.web needs Starlette: pip install 'idempotent-consumer[web]'") from error

Subject = Callable[[Request], str | Awaitable[str | None] | None]

_REPLAYED = {"idempotent-replayed": "true"}
_NOT_KEPT = frozenset(
    {
        "cache-control",
        "connection",
        "content-length",
        "date",
        "keep-alive",
        "proxy-authenticate",
        "server",
        "set-cookie",
    }
    | {"te", "trailer", "transfer-encoding", "upgrade"}
)


class _Body(str):
    """A text body that is sent as exactly the bytes it represents.

    Starlette encodes it again.
    """

    _bytes: bytes

    def __new__(cls, body: bytes) -> _Body:
        text = super().__new__(cls, body.decode("utf-8", "replace"))
        text._bytes = body
        return text

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """The bytes themselves."""
        return self._bytes


class Answered(HTTPException):
    """An answer instead of the endpoint's: the first use's, or a problem.

    FastAPI would wrap it in JSON of its own: there, and wherever another handler of HTTPException is installed, call
    `install(app)` once.
    """

    def __init__(self, status: int, media_type: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
        # Starlette's own handler sends `detail` with these headers, so `detail` holds the whole answer.
        sent = {"content-type": media_type} if media_type else {}
        sent |= {"cache-control": "no-store", **headers}
        super().__init__(status, detail=_Body(body), headers=sent)
        self.body = body

    def __str__(self) -> str:
        return f"answered with {self.status_code}"  # the body is a payload, and this may be logged

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status_code})"


class Problem(Answered):
    """problem+json. `code` tells programs what it is: token_missing, token_malformed and so on."""

    def __init__(self, status: int, code: str, detail: str, retry_after_seconds: int | None = None) -> None:
        body = {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            "code": code,
        }
        headers = {} if retry_after_seconds is None else {"retry-after": str(retry_after_seconds)}
        super().__init__(status, "application/problem+json", json.dumps(body).encode(), headers)
        self.code = code

    def __repr__(self) -> str:
        return f"Problem({self.status_code}, {self.code!r})"


def install(app: Starlette) -> None:
    """Send `Answered` and `Problem` unchanged from a Starlette or FastAPI application."""
    app.add_exception_handler(Answered, _send)


async def _send(request: Request, error: Exception) -> Response:
    assert isinstance(error, Answered)
    return Response(error.body, error.status_code, error.headers)


class Tap:
    """One request with a token.

    `redeem` uses the token up, and nothing before it does: validate first.
    """

    def __init__(self, tokens: Tokens, token: str, subject: str, again_after_seconds: float) -> None:
        self._tokens = tokens
        self._token = token
        self._subject = subject
        self._again_after = again_after_seconds
        self._message_id = ""
        self.repeated = False

    @property
    def message_id(self) -> str:
        """The id to publish under, in the header ``message-id``.

        Raises RuntimeError before `redeem`.
        """
        if not self._message_id:
            raise RuntimeError("redeem() comes first")
        return self._message_id

    async def redeem(self, payload: bytes = b"") -> Tap:
        """Use the token up, or raise the answer for the client.

        That is a `Problem`, or the first use's answer. payload: what is asked for, as bytes (the body, for example): a
        second use for something else is a problem then.

        A first use without an answer after `again_after_seconds` is taken for dead: then this returns, with `repeated`
        true and the same message id, and publishing again is safe. So it may return more than once for a token.
        """
        try:
            redeemed = await self._tokens.redeem(self._token, self._subject, payload)
        except RedisAway:
            raise _away() from None
        match redeemed:
            case Fresh(message_id):
                self._message_id = message_id
            case Used(message_id, result, used_seconds):
                if result is not None:
                    raise _replayed(result)
                left = self._again_after - used_seconds
                if left > 0:
                    raise Problem(
                        409,
                        "token_in_use",
                        "This request is being worked on. Wait for its answer.",
                        max(1, round(left)),
                    )
                self._message_id, self.repeated = message_id, True
            case OtherPayload():
                raise Problem(422, "token_used_for_another", "This token was used before, for a request that differs.")
            case Foreign():
                raise Problem(403, "token_foreign", "This token was issued to somebody else.")
            case Unknown():
                raise Problem(422, "token_unknown", "This token is unknown or has expired. Load the page again.")
            case _:
                assert_never(redeemed)
        return self

    async def answer(self, response: Response) -> Response:
        """Keep the endpoint's answer for a second tap, and return it.

        Status, body and headers are kept (Location, for example), except Set-Cookie, Date and those of the connection. Not
        kept: 5xx, which the client may try again; bodies that are streamed or longer than 64 KiB with the headers; and whatever
        Redis does not take. The answer goes out in any case.
        """
        body = getattr(response, "body", None)
        if response.status_code >= 500:
            return response
        if not isinstance(body, bytes | bytearray | memoryview):
            event(logging.WARNING, "the answer of a token's first use is streamed: it is not kept for a second tap")
            return response
        # Latin-1 maps each byte to one character, so that any body survives in JSON.
        text = bytes(body).decode("latin-1")
        kept = json.dumps([response.status_code, _headers_of(response), text], ensure_ascii=False)
        if len(kept.encode()) > RESULT_BYTES_MAX:
            event(logging.WARNING, "the answer of a token's first use is too long: it is not kept for a second tap")
            return response
        try:
            await self._tokens.store_result(self._token, self._subject, kept)
        except RedisAway:
            event(
                logging.WARNING, "redis does not answer: the answer of a token's first use is not kept for a second tap"
            )
        return response


class TokenTaps:
    """The dependency that gives a `Tap` for each request.

    ``Depends(taps)`` in FastAPI, ``await taps(request)`` in Starlette.

    tokens: those that the page's forms were given. subject: whom the request is from, exactly as it was issued; None
    for an anonymous request. header: where API clients put the token. field: of a form, for a page without JavaScript
    (needs python-multipart); the header wins. again_after_seconds: see `Tap.redeem`; longer than an endpoint ever
    takes. ::

        taps = TokenTaps(tokens, subject=lambda request: request.session.get("user"))

        async def pay(request: Request) -> Response:
            tap = await taps(request)                   # 428, 422: there is none that could be one
            payment = decode(await request.body())      # invalid? The token is still good
            await tap.redeem()                          # 409, 422, 403, 503, or the first one's answer
            await producer.send_and_wait("payments", payment, headers=[("message-id", tap.message_id.encode())])
            return await tap.answer(JSONResponse({"state": "accepted"}, 202))
    """

    def __init__(
        self,
        tokens: Tokens,
        subject: Subject,
        *,
        header: str = "Idempotency-Key",
        field: str | None = None,
        again_after_seconds: float = 10.0,
    ) -> None:
        self._tokens = tokens
        self._subject = subject
        self._header = header
        self._field = field
        self._again_after = again_after_seconds

    async def __call__(self, request: Request) -> Tap:
        """Read the token of a request, without using it up.

        Raises Problem: 428, 422, or 403 for an anonymous request.
        """
        answered: Any = self._subject(request)
        subject = await answered if inspect.isawaitable(answered) else answered
        if not subject:
            raise Problem(403, "no_user", "No user is logged in, so no token can be valid.")
        given = request.headers.getlist(self._header)
        if not given and self._field is not None:
            with suppress(RuntimeError):  # a form that was read before, by FastAPI for example
                await request.body()  # kept, so that the endpoint can read it after the form
            form = await request.form()
            given = [value if isinstance(value, str) else "" for value in form.getlist(self._field)]
        try:
            return Tap(self._tokens, self._token([value for value in given if value]), str(subject), self._again_after)
        except Problem:
            await request.close()  # no other code reads the files of this form
            raise

    def _token(self, given: Sequence[str]) -> str:
        if not given:
            raise Problem(428, "token_missing", f"This request needs a token: send it as {self._header}.")
        token = given[0]
        if len(token) > 1 and token[0] == token[-1] == '"':
            token = token[1:-1]  # the draft makes it a quoted string of RFC 8941; most clients send it bare
        if len(given) > 1 or not self._tokens.is_well_formed(token):
            raise Problem(422, "token_malformed", "What was sent as a token could not have been issued as one.")
        return token


def _away() -> Problem:
    return Problem(503, "tokens_unavailable", "Tokens cannot be checked at the moment. Send the same request again.", 1)


def _replayed(result: str) -> Answered:
    status, headers, body = json.loads(result)
    if isinstance(headers, str):  # stored by a version that kept only the media type
        headers = {"content-type": headers}
    media_type = headers.pop("content-type", "")
    return Answered(status, media_type, body.encode("latin-1"), headers | _REPLAYED)


def _headers_of(response: Response) -> dict[str, str]:
    """The headers of an answer that mean the same a second time."""
    headers: dict[str, str] = {}
    for name, value in response.headers.items():
        if name not in _NOT_KEPT:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers
