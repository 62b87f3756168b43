"""Pausing and resuming an App, a topic or a partition."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from consumer.admin import pauses
from consumer.admin.pauses import PauseResult, Target
from consumer.console.context import Console, Page
from consumer.console.guard import Refused
from consumer.core.pauses import PauseOrder, target_text
from consumer.postgres.protocol import Connection


async def ask_for(console: Console, request: Request) -> Response:
    """The form of a pause, or of its end."""
    page = Page(console, request)
    is_pause = request.url.path == "/pause"
    status = page.place.watch.known.status
    rows = [] if status is None else status.partitions
    topics = sorted({*console.app.topics, *(row["topic"] for row in rows)})
    topic, partition = page.given("topic"), page.given("partition")
    chosen = _choice(topic, None if partition is None else page.number(partition, "partition"))
    choices = [("", "the whole App")]
    for name in topics:
        choices.append((_choice(name, None), f"topic {name}"))
        choices += [
            (_choice(name, row["partition"]), f"{name}:{row['partition']}") for row in rows if row["topic"] == name
        ]
    return page.render("pause.html", is_pause=is_pause, choices=choices, chosen=chosen)


def _choice(topic: str | None, partition: int | None) -> str:
    return "" if topic is None else topic if partition is None else f"{topic}:{partition}"


def _target(page: Page) -> Target:
    """Return what a form names. Raises Refused."""
    topic, colon, partition = page.field("target").partition(":")
    return Target(page.console.app.name, topic or None, page.number(partition, "partition") if colon else None)


async def pause(console: Console, request: Request) -> Response:
    """Pause what the form names."""
    return await _change(Page(console, request), is_pause=True)


async def resume(console: Console, request: Request) -> Response:
    """End the pauses of what the form names."""
    return await _change(Page(console, request), is_pause=False)


async def _change(page: Page, *, is_pause: bool) -> Response:
    target, by = _target(page), page.by()
    if target.topic is not None:
        page.console.app.discover([target.topic])
    change = pauses.pause if is_pause else pauses.resume

    async def act(connection: Connection) -> PauseResult:
        await pauses.check_target(connection, target, page.console.app.topics)
        return await change(connection, target, by)

    result = await page.ask(act)
    if not is_pause and result.left:
        raise Refused(409, f"{target} stays paused by {_named(result.left[0])}: resume that")
    if not result.changed:
        why = f"is paused already, by {_named(result.left[0])}" if result.left else "is not paused"
        raise Refused(409, f"{target} {why}; nothing was changed")
    await page.place.watch.refresh()
    return RedirectResponse(page.url("/"), 303)


def _named(order: PauseOrder) -> str:
    where = target_text(order.topic, order.partition)
    return f"the pause of {where} by {order.operator}"
