"""Tokens for SASL OAUTHBEARER, from a function of yours: `module:callable`, named by CONSUMER_KAFKA_SASL_TOKEN_PROVIDER.

Knows how to find the function, to call it, and how long an answer may be used; knows no Kafka. What it does not know:
what a token means, and whether Kafka will take it. Neither a token nor the text of an error of yours is told to anybody.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consumer.core.errors import Misconfigured
from consumer.logs import describe

_MARGIN_SECONDS = 30.0  # before its expiry a token is used no more: the clocks differ, and its way takes time
CALL_SECONDS = 5.0
_YEAR_2001_SECONDS, _YEAR_5000_SECONDS = 978_307_200, 95_617_584_000
_WANTED = "a token as text, or (token, expiry as seconds or milliseconds since 1970, a datetime, or None)"


class NoToken(Exception):
    """The function did not give a token now. The text names the setting, and quotes nothing."""


def find(path: str) -> Callable[[], Any]:
    """The function that `module:callable` names, with the current directory on the import path. Raises Misconfigured."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise Misconfigured(f'CONSUMER_KAFKA_SASL_TOKEN_PROVIDER={path}: write "module:callable"')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Misconfigured(
            f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER={path} cannot be imported: {describe(error)}"
        ) from None
    if not callable(found):
        raise Misconfigured(
            f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER={path} is a {type(found).__name__}, which cannot be called"
        )
    return found  # type: ignore[no-any-return]


class Bearer:
    """Gives tokens, each for as long as it lasts.

    function: called without arguments, in a thread when it is not async; returns the token as text, or a pair of it and its
    expiry (seconds or milliseconds since 1970, a datetime, ISO 8601, or None). A token without an expiry is used once, so the function is asked at every connection.
    """

    def __init__(self, function: Callable[[], Any], now: Callable[[], float] = time.time) -> None:
        self._function = function
        self._now = now
        self._token, self._until = "", 0.0
        self._asking = asyncio.Lock()

    async def token(self) -> str:
        """A token that has not expired. Raises NoToken when the function fails, takes too long or returns something else."""
        async with self._asking:  # many connections are opened at once
            if self._now() >= self._until:
                self._token, self._until = await self._ask()
            return self._token

    def refused(self) -> None:
        """Kafka did not take the last token: the next one is asked for anew, whatever its expiry was said to be."""
        self._until = 0.0

    async def _ask(self) -> tuple[str, float]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                if inspect.iscoroutinefunction(self._function):
                    found = await self._function()
                else:
                    found = await asyncio.to_thread(self._function)
                    if inspect.isawaitable(found):
                        found = await found
        except Exception as error:
            raise NoToken(f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER gave no token: {describe(error)}") from None
        token, expiry = found if isinstance(found, tuple) and len(found) == 2 else (found, 0.0)
        if not isinstance(token, str):
            raise NoToken(f"CONSUMER_KAFKA_SASL_TOKEN_PROVIDER must return {_WANTED}")
        until = _seconds(expiry) if isinstance(found, tuple) else 0.0
        if until and until <= self._now():
            raise NoToken(
                "CONSUMER_KAFKA_SASL_TOKEN_PROVIDER returned a token that has expired already: "
                "look at its expiry and at this machine's clock"
            )
        if not token or any(
            not 0x20 < ord(each) < 0x7F for each in token
        ):  # RFC 6750: visible ASCII; \x01 ends the field
            raise NoToken("CONSUMER_KAFKA_SASL_TOKEN_PROVIDER returned a text that can be no token")
        return token, until - _MARGIN_SECONDS


def _seconds(expiry: object) -> float:
    """An expiry in seconds since 1970; 0 for none. Raises NoToken for what is no point in time.

    Amazon's signer for MSK gives milliseconds, others a datetime or ISO 8601.
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
