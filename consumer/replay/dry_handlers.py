"""Runs work with handlers that cannot reach the outside.

Imports the app and the guard of dry runs.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from consumer.app import App
from consumer.app_loader import running
from consumer.core.errors import Misconfigured
from consumer.transaction import dry_run_guard

_T = TypeVar("_T")


async def with_dry_handlers(
    app: App, work: Callable[[], Awaitable[_T]], *, allow_outside: bool = False, alone: bool = False
) -> _T:
    """Run work in the App's lifespan, and refuse connections that handlers open.

    Args:
        app: its handlers are wrapped, for as long as the App lives.
        work: calls the handlers.
        allow_outside: refuse nothing.
        alone: the process does nothing else; see `dry_run_guard`.

    Raises Misconfigured for a handler that would have reached the outside.
    """
    if allow_outside:
        return await _with_lifespan(app, work)
    guard = None
    try:
        with dry_run_guard.guarded(alone=alone) as guard:
            result = await _with_lifespan(app, work)
    except (Exception, asyncio.CancelledError):
        if guard is None or not guard.refused:
            raise
    if guard is not None and guard.refused:  # the handler may have swallowed the refusal
        raise Misconfigured(guard.refused)
    return result


async def _with_lifespan(app: App, work: Callable[[], Awaitable[_T]]) -> _T:
    lifespan, subject = running(app), f"the lifespan of App {app.name!r}"
    with dry_run_guard.running_as(subject):
        await lifespan.__aenter__()
    try:
        for handler in app.handlers.values():
            handler.call = dry_run_guard.around(handler)
        result = await work()
    except BaseException:
        with dry_run_guard.running_as(subject):
            if not await lifespan.__aexit__(*sys.exc_info()):
                raise
        raise  # a lifespan that swallows exceptions leaves no result
    with dry_run_guard.running_as(subject):
        await lifespan.__aexit__(None, None, None)
    return result
