"""Who asks: the operator of a request.

Three ways: this process's user, a header of a proxy, or a function of yours. There are no passwords of our own.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from starlette.requests import Request

from consumer.admin.operators import system_user
from consumer.console.options import PROXY
from consumer.core.errors import Misconfigured
from consumer.core.hosts import is_local
from consumer.logs import describe
from consumer.setting_sources import load_function
from consumer.settings import Settings

USER_HEADER = "x-forwarded-user"
SECRET_HEADER = "x-console-secret"  # noqa: S105 - the name of a header
_NAME_MAX = 200
_SECONDS = 10.0
_ELSEWHERE = ("192.0.2.1", 1)  # an address of documentation (RFC 5737), which no client has


class AuthFailed(Exception):
    """The function of --auth raised, or returned what is no name."""


class Auth(Protocol):
    """Names the operator of a request."""

    async def operator(self, request: Request) -> str | None:
        """Return the operator's name; None: refused. Raises AuthFailed."""


class LocalUser:
    """Everyone is the user who started the console."""

    def __init__(self) -> None:
        self._name = system_user()

    async def operator(self, request: Request) -> str | None:
        return self._name


class ByProxy:
    """The name in X-Forwarded-User, from a proxy that is known.

    It is known by the secret; without one, by being on this machine.
    """

    def __init__(self, secret: str | None) -> None:
        self._secret = secret

    async def operator(self, request: Request) -> str | None:
        if self._secret is not None:
            given = request.headers.get(SECRET_HEADER, "")
            if not hmac.compare_digest(given.encode("latin-1"), self._secret.encode("utf-8")):
                return None
        elif request.client is None or not is_local(request.client.host):
            return None
        names = request.headers.getlist(USER_HEADER)
        return _name(_decoded(names[0])) if len(names) == 1 else None


class ByFunction:
    """The name that a function of yours returns for a request.

    function: called with Starlette's Request, without its body; returns a name, or None to refuse. It may be async; if
    not, it runs in a thread.
    """

    def __init__(self, function: Callable[[Request], Any]) -> None:
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - the method of an object
        )

    async def operator(self, request: Request) -> str | None:
        try:
            async with asyncio.timeout(_SECONDS):
                name = await self._ask(request)
        except Exception as error:
            raise AuthFailed(describe(error)) from None
        if name is not None and not isinstance(name, str):
            raise AuthFailed(f"it returned {type(name).__name__}")
        return None if name is None else _name(name)

    async def _ask(self, request: Request) -> Any:
        answer = await self._function(request) if self._is_async else await asyncio.to_thread(self._function, request)
        return await answer if inspect.isawaitable(answer) else answer


def _decoded(text: str) -> str:
    """Return a header's text, which proxies write in UTF-8."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _name(text: str) -> str | None:
    """Return a name that can be recorded, or None."""
    name = text.strip()
    return name if name and len(name) <= _NAME_MAX and name.isprintable() else None


async def auth_of(option: str | None, settings: Settings) -> Auth:
    """Return what names operators.

    A function is called once, for a request from nowhere. Raises Misconfigured if it cannot be imported, raises then, or
    lets it in.
    """
    if option is None:
        return LocalUser()
    if option == PROXY:
        secret = settings.console_proxy_secret
        return ByProxy(None if secret is None else secret.get_secret_value())
    auth = ByFunction(load_function(f"--auth {option!r}", option))
    try:
        name = await auth.operator(_request_from_nowhere())
    except AuthFailed as error:
        raise Misconfigured(
            f"--auth {option}: it fails for a request without headers ({error}); return None to refuse a request"
        ) from None
    if name is not None:
        raise Misconfigured(f"--auth {option}: it lets in a request without headers; return None to refuse a request")
    return auth


def _request_from_nowhere() -> Request:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": _ELSEWHERE,
        "server": ("192.0.2.2", 80),
        "state": {},
    }
    return Request(scope)
