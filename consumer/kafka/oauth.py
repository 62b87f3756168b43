"""Tokens for SASL OAUTHBEARER, from the function that CONSUMER_KAFKA_SASL_TOKEN_PROVIDER names.

Imports the function, calls it, keeps its token until shortly before the expiry, and hands it to aiokafka. Neither a token nor
the text of the function's errors is logged.

Limitations: does not read the token; only Kafka decides whether it is valid.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from aiokafka import conn as client_connections
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import OAuthAuthenticator
from aiokafka.errors import KafkaError

from consumer.logs import describe

_MARGIN_SECONDS = 30.0  # before its expiry a token is used no more: the clocks differ, and its way takes time
CALL_SECONDS = 5.0
_YEAR_2001_SECONDS, _YEAR_5000_SECONDS = 978_307_200, 95_617_584_000
_WANTED = "a token as text, or (token, expiry as seconds or milliseconds since 1970, a datetime, or None)"


class NoToken(Exception):
    """The function gave no token; the text quotes nothing of it."""


class TokenUnavailable(KafkaError):  # type: ignore[misc]
    """NoToken, as an error that aiokafka answers by trying again."""


class TokenCache:
    """Calls the function, and keeps its token until it expires.

    function: called without arguments, in a thread when it is not async; returns the token as text, or a pair of it and its
    expiry (seconds or milliseconds since 1970, a datetime, ISO 8601, or None). A token without an expiry is used once: the
    function is called for every connection.
    """

    def __init__(self, function: Callable[[], Any], now: Callable[[], float] = time.time) -> None:
        self._function = function
        self._now = now
        self._token, self._until = "", 0.0
        self._asking = asyncio.Lock()

    async def token(self) -> str:
        """Return a token that has not expired.

        Raises NoToken when the function fails, takes too long or returns something else.
        """
        async with self._asking:  # many connections are opened at once
            if self._now() >= self._until:
                self._token, self._until = await self._ask()
            return self._token

    def refused(self) -> None:
        """Discard the kept token, which Kafka refused, whatever its expiry."""
        self._until = 0.0

    async def _ask(self) -> tuple[str, float]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                if inspect.iscoroutinefunction(self._function):
                    answer = await self._function()
                else:
                    answer = await asyncio.to_thread(self._function)
                    if inspect.isawaitable(answer):
                        answer = await answer
        except Exception as error:
            raise NoToken(f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER gave no token: {describe(error)}") from None
        token, expiry = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, 0.0)
        if not isinstance(token, str):
            raise NoToken(f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER must return {_WANTED}")
        until = _seconds(expiry) if isinstance(answer, tuple) else 0.0
        if until and until <= self._now():
            raise NoToken(
                "CONSUMER_KAFKA_SASL_TOKEN_PROVIDER returned a token that has expired already: "
                "look at its expiry and at this machine's clock"
            )
        # RFC 6750: visible ASCII; \x01 ends the field
        if not token or any(not 0x20 < ord(character) < 0x7F for character in token):
            raise NoToken("CONSUMER_KAFKA_SASL_TOKEN_PROVIDER returned a text that can be no token")
        return token, until - _MARGIN_SECONDS


def _seconds(expiry: object) -> float:
    """Return an expiry in seconds since 1970; 0 for none.

    Raises NoToken for what is no time. Amazon's signer for MSK gives milliseconds, others a datetime or ISO 8601.
    """
    if expiry is None:
        return 0.0
    if isinstance(expiry, str):
        try:
            expiry = float(expiry)
        except ValueError:
            with suppress(ValueError):
                expiry = datetime.fromisoformat(str(expiry))
    if isinstance(expiry, datetime):
        expiry = (expiry if expiry.tzinfo else expiry.replace(tzinfo=UTC)).timestamp()
    if isinstance(expiry, bool) or not isinstance(expiry, int | float) or not math.isfinite(expiry) or expiry < 0:
        raise NoToken(f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER must return {_WANTED}")
    if expiry > _YEAR_5000_SECONDS:
        expiry /= 1000  # milliseconds
    if expiry > _YEAR_5000_SECONDS or 0 < expiry < _YEAR_2001_SECONDS:
        raise NoToken(
            "CONSUMER_KAFKA_SASL_TOKEN_PROVIDER returned an expiry that is no time since 1970 in seconds or milliseconds "
            "(a lifetime must be added to the time now)"
        )
    return float(expiry)


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Hands the tokens of a TokenCache to aiokafka."""

    def __init__(self, tokens: TokenCache) -> None:
        self._tokens = tokens

    async def token(self) -> str:
        try:
            return await self._tokens.token()
        except NoToken as error:
            raise TokenUnavailable(str(error)) from None

    def refused(self) -> None:
        self._tokens.refused()


class _Authenticator(OAuthAuthenticator):  # type: ignore[misc]
    """Ends the exchange when the broker refuses a token.

    The client's own takes a refused token for accepted, and waits for metadata for ever (seen with aiokafka 0.14). A broker
    that refuses a token says why in an answer without an error code, and waits for one more byte before it sends the code
    (RFC 7628, 3.2.3).
    """

    async def step(self, payload: bytes | None) -> tuple[bytes, bool] | None:
        if self._token_sent and payload:
            self._sasl_oauth_token_provider.refused()
            return b"\x01", True
        return await super().step(payload)  # type: ignore[no-any-return]


client_connections.OAuthAuthenticator = _Authenticator
