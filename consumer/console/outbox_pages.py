"""The pages of the outbox: streams, one stream, resume and discard."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from consumer.admin import outbox as admin
from consumer.console.context import Console, Page
from consumer.console.guard import Refused
from consumer.core.message import Partition
from consumer.outbox.streams import named
from consumer.postgres import outbox
from consumer.postgres.protocol import Connection

_ROWS_MAX = 50
_DISCARD_MAX = 1_000_000


async def streams(console: Console, request: Request) -> Response:
    """Every stream: what is published, what waits, what stopped."""
    page = Page(console, request)

    async def ask(connection: Connection) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        rows = [admin.stream_as_dict(stream) for stream in await outbox.overview(connection, console.app.name)]
        return rows, await admin.summary(connection, console.app.name)

    rows, summary = await page.ask(ask)
    rows.sort(key=lambda row: (row["stopped"] is None, row["stream"]))
    return page.render("outbox.html", rows=[row | {"source": _source(row)} for row in rows], summary=summary)


async def one(console: Console, request: Request) -> Response:
    """One stream, without the bytes of its rows."""
    page = Page(console, request)
    number = page.number(request.path_params["stream"], "stream")
    stream = await page.ask(lambda connection: admin.read_stream(connection, console.app.name, number, _ROWS_MAX))
    return page.render("stream.html", stream=stream, source=_source(stream), rows_max=_ROWS_MAX)


async def resume(console: Console, request: Request) -> Response:
    """Let a stopped stream go on from the row that was refused."""
    return await _go_on(Page(console, request), 0)


async def discard(console: Console, request: Request) -> Response:
    """Leave out rows of a stopped stream."""
    page = Page(console, request)
    rows = page.number(page.field("rows"), "rows")
    if not 1 <= rows <= _DISCARD_MAX:
        raise Refused(400, f"rows: 1 to {_DISCARD_MAX:,}")
    return await _go_on(page, rows)


async def _go_on(page: Page, rows: int) -> Response:
    app, by = page.console.app.name, page.by()
    number = page.number(page.request.path_params["stream"], "stream")
    seen = page.number(page.field("at"), "at")

    async def act(connection: Connection) -> admin.Resumed:
        stream = await admin.read_stream(connection, app, number, 1)
        if stream["published"] != seen:  # another operator was faster: it stopped at another row
            raise Refused(409, f"stream {number} has moved since the page was loaded; look at it again")
        return await admin.resume(page.place.settings, connection, app, number, rows, by)

    done = await page.ask(act)
    if done.from_seq is None:
        raise Refused(409, f"stream {number} is not stopped; nothing was changed")
    await page.place.watch.refresh()
    return RedirectResponse(page.url(f"/outbox/{number}"), 303)


def _source(stream: dict[str, Any]) -> str:
    return named(Partition(stream["source_topic"], stream["source_partition"]))
