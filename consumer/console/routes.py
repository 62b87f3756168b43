"""The routes of the console, and its answers when a page fails."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from consumer.console import (
    audit_page,
    dead_letter_pages,
    outbox_pages,
    pause_pages,
    replay_pages,
    settle_pages,
    state_pages,
)
from consumer.console.auth import Auth
from consumer.console.context import Console, Page
from consumer.console.guard import Guard, Refused
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.logs import describe, event
from consumer.postgres.errors import Outage
from consumer.replay.html.page import style

Endpoint = Callable[[Console, Request], Awaitable[Response]]

_STATIC = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}


def application(console: Console, auth: Auth, hosts: frozenset[str] | None) -> Guard:
    """Return the ASGI application.

    hosts: the host names that are served; None: all.
    """
    routes = [
        _get(console, "/", state_pages.partitions),
        _get(console, "/handlers", state_pages.handlers),
        _get(console, "/dead-letters", dead_letter_pages.overview),
        _get(console, "/dead-letters/{number}", dead_letter_pages.one),
        # Changes nothing but the record, so that read-only consoles have it, too.
        Route("/dead-letters/{number}/message", partial(dead_letter_pages.message, console), methods=["POST"]),
        _get(console, "/outbox", outbox_pages.streams),
        _get(console, "/outbox/{stream}", outbox_pages.one),
        _get(console, "/replays", replay_pages.overview),
        _get(console, "/replays/{name}", replay_pages.one),
        _get(console, "/audit", audit_page.entries),
        Route("/static/{name}", _static, methods=["GET"]),
    ]
    changes: list[tuple[str, str, Endpoint]] = [
        ("GET", "/dead-letters/settle", settle_pages.confirm),
        ("POST", "/dead-letters/settle", settle_pages.settle),
        ("POST", "/dead-letters/{number}/edit", settle_pages.edit),
        ("GET", "/jobs", settle_pages.jobs),
        ("GET", "/jobs/{id}", settle_pages.job),
        ("POST", "/jobs/{id}/stop", settle_pages.stop),
        ("GET", "/pause", pause_pages.ask_for),
        ("POST", "/pause", pause_pages.pause),
        ("GET", "/resume", pause_pages.ask_for),
        ("POST", "/resume", pause_pages.resume),
        ("POST", "/outbox/{stream}/resume", outbox_pages.resume),
        ("POST", "/outbox/{stream}/discard", outbox_pages.discard),
    ]
    # Before the others: "settle" is no number of a dead letter.
    routes[:0] = [
        Route(path, partial(endpoint if console.options.actions else _read_only, console), methods=[method])
        for method, path, endpoint in changes
    ]
    pages = Starlette(
        routes=routes,
        exception_handlers={
            Refused: partial(_refused, console),
            Outage: partial(_away, console),
            ServiceUnavailable: partial(_away, console),
            Misconfigured: partial(_misconfigured, console),
            HTTPException: partial(_not_found, console),
            Exception: _failed,
        },
    )
    pages.router.redirect_slashes = False
    return Guard(pages, auth, console.tokens, hosts)


def _get(console: Console, path: str, endpoint: Endpoint) -> Route:
    return Route(path, partial(endpoint, console), methods=["GET"])


async def _read_only(console: Console, request: Request) -> Response:
    raise Refused(403, "this console is read-only; start it with --actions to allow changes")


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "report.css":
        return Response(style(), media_type="text/css")
    if name not in _STATIC:
        return PlainTextResponse("no such file\n", 404)
    body = (resources.files(__package__) / "static" / name).read_bytes()
    return Response(body, media_type=_STATIC[name])


def _problem(console: Console, request: Request, status: int, heading: str, text: str, **more: Any) -> Response:
    try:
        page = Page(console, request)
    except Refused as refused:  # the shard that it names does not exist
        return PlainTextResponse(f"{refused}\n", refused.status)
    return page.render("problem.html", status, heading=heading, text=text, **{"is_away": False, **more})


async def _refused(console: Console, request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    heading = "Not there" if error.status == 404 else "Not done"
    return _problem(console, request, error.status, heading, str(error))


async def _away(console: Console, request: Request, error: Exception) -> Response:
    """PostgreSQL does not answer: what is known stays on the other pages."""
    return _problem(console, request, 503, "PostgreSQL does not answer", str(error), is_away=True)


async def _misconfigured(console: Console, request: Request, error: Exception) -> Response:
    return _problem(console, request, 409, "Not possible", str(error))


async def _not_found(console: Console, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _problem(console, request, 404, "Not there", "there is no such page")
    return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Answer for a fault of ours.

    Its text may quote a message, so it is not shown.
    """
    event(logging.ERROR, "a page of the console failed", path=request.url.path, error=describe(error))
    return PlainTextResponse("this page failed; the log says where\n", 500)
