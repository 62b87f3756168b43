"""The page of what operators did."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from consumer.admin import audit
from consumer.console.context import Console, Page
from consumer.console.guard import Refused
from consumer.core.audit import known_actions

_SHOWN_MAX = 200


async def entries(console: Console, request: Request) -> Response:
    """Who did what, when and why."""
    page = Page(console, request)
    action = page.given("action")
    if action is not None and action not in known_actions():
        raise Refused(400, f"action: one of {', '.join(known_actions())}")
    rows = await page.ask(lambda connection: audit.entries(connection, console.app.name, action, None, _SHOWN_MAX))
    return page.render("audit.html", rows=rows, actions=known_actions(), given=action, limit=_SHOWN_MAX)
