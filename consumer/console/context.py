"""The console's state, and what every page is rendered with."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from consumer.admin.ledger_access import with_ledger
from consumer.app import App
from consumer.console.guard import Form, Refused
from consumer.console.jobs import Jobs
from consumer.console.options import ConsoleOptions
from consumer.console.tokens import FormTokens
from consumer.console.watch import Watch
from consumer.core.audit import ActedBy
from consumer.core.dead_letters import normalized
from consumer.postgres.connection import translated_errors
from consumer.postgres.protocol import Connection
from consumer.replay.html import values
from consumer.replay.html.elements import Html, el, escaped, escaped_lines
from consumer.settings import Settings
from consumer.sharding import shards

T = TypeVar("T")

_CONNECTIONS_MAX = 4  # at a time, for pages
_CONNECT_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
WHY_MAX = 500


@dataclass(slots=True)
class Place:
    """One database of the App, and what is known of it."""

    settings: Settings
    watch: Watch


@dataclass(slots=True)
class Console:
    """What the pages share.

    path: how commands name the App. places: databases by shard; without shards one, whose name is empty.
    """

    app: App
    path: str
    settings: Settings
    options: ConsoleOptions
    tokens: FormTokens = field(default_factory=lambda: FormTokens(secrets.token_bytes(32)))
    places: dict[str, Place] = field(default_factory=dict)
    templates: Environment = field(default_factory=lambda: _environment())
    jobs: Jobs = field(init=False)
    _connections: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONNECTIONS_MAX))

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.path, self.settings)
        for name, settings in shards.settings_of(self.app, self.settings).items():
            quick = settings.model_copy(update={"wait_seconds": _CONNECT_SECONDS})
            self.places[name] = Place(quick, Watch(self.app, self.path, settings))

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Read the services in this block; end jobs after it."""
        tasks = [asyncio.create_task(place.watch.run()) for place in self.places.values()]
        try:
            yield
        finally:
            await self.jobs.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def ask(self, shard: str, question: Callable[[Connection], Awaitable[T]]) -> T:
        """Ask a database. Raises Misconfigured, ServiceUnavailable, Outage."""
        settings = self.places[shard].settings
        async with self._connections:
            with translated_errors(settings):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return await with_ledger(settings, question)


class Page:
    """One request, and what its page needs."""

    def __init__(self, console: Console, request: Request) -> None:
        self.console = console
        self.request = request
        self.operator: str = request.scope["operator"]
        self.form: Form = request.scope.get("form", {})
        self.shard = self._shard()

    def _shard(self) -> str:
        known = self.console.places
        name = self.field("shard") or self.request.query_params.get("shard") or next(iter(known))
        if name not in known:
            raise Refused(404, "there is no such shard")
        return name

    @property
    def place(self) -> Place:
        return self.console.places[self.shard]

    def field(self, name: str) -> str:
        """Return the first such field of the form; empty for none."""
        return (self.form.get(name) or ("",))[0]

    def given(self, name: str) -> str | None:
        """Return a parameter of the address; None where it is empty."""
        return self.request.query_params.get(name) or None

    def number(self, text: str | None, name: str) -> int:
        """Return a number. Raises Refused."""
        if text is None or not text.isascii() or not text.isdigit() or len(text) > 18:
            raise Refused(400, f"{name}: not a number")
        return int(text)

    def by(self) -> ActedBy:
        """Return who acts, and why. Raises Refused without a reason."""
        why = " ".join(self.field("why").split())
        if not why or len(why) > WHY_MAX:
            raise Refused(
                400,
                f"the reason is missing, or longer than {WHY_MAX} characters: it is kept on record; go back and give one",
            )
        return ActedBy(self.operator, why)

    async def ask(self, question: Callable[[Connection], Awaitable[T]]) -> T:
        """Ask the database of this page."""
        return await self.console.ask(self.shard, question)

    def url(self, path: str, **query: object) -> str:
        """Return an address within the console, for the same shard."""
        given = {name: str(text) for name, text in query.items() if text not in (None, "")}
        if self.shard:
            given["shard"] = self.shard
        return f"{path}?{urlencode(given)}" if given else path

    def render(self, template: str, status: int = 200, **values_of_page: Any) -> Response:
        """Return a page."""
        console, known = self.console, self.place.watch.known
        text = console.templates.get_template(template).render(
            app=console.app.name,
            path=console.path,
            has_actions=console.options.actions,
            operator=self.operator,
            token=console.tokens.of(self.operator),
            form_id=secrets.token_hex(16),
            shards=[name for name in console.places if name],
            shard=self.shard,
            known=known,
            now=time.time(),
            url=self.url,
            here=self.request.url.path,
            **values_of_page,
        )
        return HTMLResponse(text, status)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("consumer.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": values.number,
        "code": values.code,
        "shown": escaped,
        "lines": escaped_lines,
        "summary": _summary,
        "when": _when,
        "ago": _ago,
        "seconds": values.duration,
    }
    return environment


def _when(value: object) -> object:
    """Return a time as an element.

    value: Unix seconds, or ISO 8601.
    """
    if value is None:
        return values.ABSENT
    if isinstance(value, int | float):
        return values.when(datetime.fromtimestamp(value, UTC).isoformat())
    return values.when(value)


def _summary(error: str) -> Html:
    """Return an error without what it quotes of its message."""
    return escaped(normalized(error))


def _ago(at: float, now: float) -> Html:
    """Return how long ago a time was."""
    return el("span", values.duration(max(0.0, now - at)), " ago")
