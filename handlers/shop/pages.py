"""The payment page: its routes, its content, and the faults it offers.

handlers/shop/payments_api.py stores the messages; a worker elsewhere sends them, and charges.
"""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from string import Template
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from consumer.local_servers import EmbeddedUnavailable
from consumer.schemes.redis_call import RedisAway
from consumer.schemes.tokens import Tokens
from consumer.schemes.web import Answered, Problem, install
from handlers.shop.application import SANDBOX_TOPIC, TOPIC
from handlers.shop.log_watch import LogWatch
from handlers.shop.orders import Order, Orders, Switches, switches
from handlers.shop.payments_api import DATABASE_AWAY, DATABASE_SECONDS, TOKENS_SECONDS, PaymentsApi
from handlers.shop.requests import COOKIE, body_of, is_form, visitor_of
from handlers.shop.running import Running
from handlers.shop.view import Seen, Services, describe, is_waiting, topic_of

_STATIC = Path(__file__).with_name("static")
_LOOK_SECONDS = (0.1, 0.5)  # between two looks at an order: while something is on its way, and else
_PROBE_SECONDS = 0.5
_HEARTBEAT_SECONDS = 10.0
_WATCHERS_MAX = 40
_SERVICES = ("kafka", "postgresql", "redis", "worker")
# One statement, so one snapshot. Positions and dead letters are the framework's tables.
_SEEN = """
select jsonb_build_object(
    'order', (select jsonb_build_object('state', state, 'version', version) from shop.orders where order_id = $1),
    'charges', (select jsonb_agg(jsonb_build_array(topic_partition, topic_offset, amount)) from shop.charges
                where order_id = $1),
    'balance', (select balance from shop.accounts where visitor = $2 and protected = $3),
    'positions', (select jsonb_agg(jsonb_build_array(partition, next_offset)) from consumer.positions
                  where app = 'shop' and topic = $4),
    'letters', (select jsonb_agg(jsonb_build_array(partition, "offset", reason)) from consumer.dead_letters
                where topic = $4 and key = $5)
)::text
"""


class Page:
    """The web application's state.

    Connections, orders, and what was last seen of the services.
    """

    def __init__(self, running: Running, token_seconds: float) -> None:
        self.running = running
        self.orders = Orders()
        self.stopping = asyncio.Event()
        self._token_seconds = token_seconds
        self._redis = Redis.from_url(running.valkey.url)
        self._tokens = Tokens(self._redis, prefix="shop:token:", budget_seconds=TOKENS_SECONDS)
        self.payments = PaymentsApi(self.orders, self._tokens)
        self._log = LogWatch(running.tansu.bootstrap_servers, (TOPIC, SANDBOX_TOPIC))
        self._watchers = 0
        self._kafka = self._redis_up = True
        self._template = Template((_STATIC / "page.html").read_text("utf-8"))

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Connections to all services, for as long as the block lasts."""
        dsn = self.running.settings.dsn
        async with asyncpg.create_pool(
            dsn, min_size=0, max_size=8, command_timeout=DATABASE_SECONDS
        ) as self.payments.pool:
            tasks = [asyncio.create_task(work) for work in (self._probe(), self._log.run())]
            try:
                yield
            finally:
                self.running.thaw()  # else the reader would wait for it
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._redis.aclose()

    # -- pages ------------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page, with the visitor's open order, or a new one."""
        visitor = visitor_of(request)
        if visitor is None:
            visitor = uuid4()
        order = self.orders.open(visitor)
        if order is None:
            order = await self._new_order(visitor, Switches())
        return await self._render(order)

    async def _render(self, order: Order, status: int = 200, notice: str = "") -> Response:
        view = await self._describe(order)
        layers = order.switches
        values = {
            "order": str(order.id),
            "token": order.token or "",
            "notice": notice,
            "verdict": view["verdict"]["text"],
            "balance": f"{view['account']['name']}: {view['account']['balance'] or 'unknown now'}",
            "greying_on": "checked" if layers.greying else "",
            "token_on": "checked" if layers.token else "",
            "ledger_on": "checked" if layers.ledger else "",
        }
        body = self._template.substitute({name: html.escape(value) for name, value in values.items()})
        response = Response(body, status, media_type="text/html")
        response.set_cookie(COOKIE, order.visitor.hex, httponly=True, samesite="strict", max_age=86_400)
        return response

    async def new_order(self, request: Request) -> Response:
        """Make another order, under the given switches.

        The visitor's page shows it from now on.
        """
        visitor = visitor_of(request)
        if visitor is None:
            raise Problem(403, "no_user", "Load the page first: it makes a visitor of you.")
        given = await body_of(request)
        as_form = is_form(request)
        if as_form:  # an unchecked box is not sent
            given = {name: given.pop(name, "off") == "on" for name in ("greying", "token", "ledger")} | given
        try:
            wanted = switches(given)
        except ValueError as error:
            raise Problem(422, "switches_invalid", str(error)) from None
        order = await self._new_order(visitor, wanted)
        if as_form:
            return RedirectResponse("/", 303)
        return JSONResponse({"order": str(order.id)}, 201, {"location": f"/orders/{order.id}"})

    async def _new_order(self, visitor: UUID, wanted: Switches) -> Order:
        order = Order(uuid4(), visitor, wanted)
        if wanted.token:
            with suppress(RedisAway):  # the page says so
                order.token = await self._tokens.issue(f"{visitor}/{order.id}", self._token_seconds)
        self.orders.add(order)
        return order

    # -- paying -----------------------------------------------------------------------------------------------------

    async def pay(self, request: Request) -> Response:
        """Accept a tap.

        202: its message is committed, and nothing is charged yet; any other answer is a problem.
        """
        order = self.payments.find_order(request)
        tap = order.tap()
        try:
            response = await self.payments.pay(request, order, tap)
        except Answered as answer:
            tap.status = answer.status_code
            if isinstance(answer, Problem):
                tap.text = json.loads(answer.body)["detail"]
            else:
                tap.text = "answered with the first tap's result"
            response = Response(answer.body, answer.status_code, answer.headers)
        except Exception:
            tap.status, tap.text = 500, "failed on the way: see what was sent"
            raise
        else:
            tap.status = response.status_code
        if not is_form(request):
            return response
        # Without JavaScript. No redirect: a reload sends it again, which the page is there to show.
        refusal = json.loads(bytes(response.body))
        return await self._render(order, response.status_code, f"Answer {response.status_code}: {refusal['detail']}")

    # -- what is seen -----------------------------------------------------------------------------------------------

    async def order(self, request: Request) -> Response:
        """The order as the page shows it, once."""
        return JSONResponse(await self._describe(self.payments.find_order(request)))

    async def events(self, request: Request) -> Response:
        """The same by server-sent events: at once, and whenever it changes."""
        order = self.payments.find_order(request)
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._watchers >= _WATCHERS_MAX:
            raise Problem(503, "too_many_watchers", "Too many pages are open.", 5)
        return StreamingResponse(self._changes(order), media_type="text/event-stream")

    async def _changes(self, order: Order) -> AsyncIterator[str]:
        self._watchers += 1
        clock = asyncio.get_running_loop().time
        last, sent_at = "", clock()
        try:
            while not self.stopping.is_set():
                seen = await self._seen(order)
                state = json.dumps(self._view(order, seen))
                if state != last or clock() - sent_at > _HEARTBEAT_SECONDS:
                    yield f"data: {state}\n\n" if state != last else ": nothing new\n\n"
                    last, sent_at = state, clock()
                try:
                    await asyncio.wait_for(self.stopping.wait(), _LOOK_SECONDS[0 if is_waiting(order, seen) else 1])
                except TimeoutError:
                    continue
        finally:
            self._watchers -= 1

    async def _describe(self, order: Order) -> dict[str, Any]:
        return self._view(order, await self._seen(order))

    def _view(self, order: Order, seen: Seen | None) -> dict[str, Any]:
        services = Services(self._kafka, seen is not None, self._redis_up, self.running.worker.pid)
        return describe(order, seen, services, self.running.worker.causes(topic_of(order)))

    async def _seen(self, order: Order) -> Seen | None:
        """What PostgreSQL holds now; None when it does not say."""
        for sent in order.sent:
            sent.place = sent.place or self._log.places.get(sent.tap)
        try:
            async with self.payments.pool.acquire(timeout=DATABASE_SECONDS) as connection:
                text = await connection.fetchval(
                    _SEEN, order.id, order.visitor, order.switches.ledger, topic_of(order), order.id.bytes
                )
        except DATABASE_AWAY:
            return None
        row = json.loads(text)
        charges: dict[tuple[int, int], int] = {}
        for partition, offset, _ in row["charges"] or []:
            charges[partition, offset] = charges.get((partition, offset), 0) + 1
        return Seen(
            charges=charges,
            charged=sum(amount for _, _, amount in row["charges"] or []),
            positions=dict(row["positions"] or []),
            letters={(partition, offset): reason for partition, offset, reason in row["letters"] or []},
            **(row["order"] or {}),
            **({"balance": row["balance"]} if row["balance"] is not None else {}),
        )

    async def _probe(self) -> None:
        while True:
            running = self.running
            self._kafka = running.kafka_runs() and await asyncio.to_thread(running.tansu.answers)
            self._redis_up = running.redis_runs() and await asyncio.to_thread(running.valkey.answers)
            await asyncio.sleep(_PROBE_SECONDS)

    # -- faults -----------------------------------------------------------------------------------------------------

    async def service(self, request: Request) -> Response:
        """Stop or start a service, or kill the worker.

        To see what the page says then.
        """
        name = request.path_params["name"]
        if name not in _SERVICES:
            raise Problem(404, "service_unknown", f"There are {', '.join(_SERVICES)}.")
        if visitor_of(request) is None:
            raise Problem(403, "no_user", "Load the page first: it makes a visitor of you.")
        given = await body_of(request)
        match given.get("do"):
            case "stop":
                await self.running.stop(name)
            case "start":
                try:
                    await self.running.start(name)
                except EmbeddedUnavailable:
                    raise Problem(503, "service_unavailable", f"{name} does not come back. Try again.", 1) from None
            case "kill" if name == "worker":
                self.running.worker.kill()
            case _:
                raise Problem(422, "do_unknown", "do: stop or start; kill for the worker")
        return RedirectResponse("/", 303) if is_form(request) else JSONResponse({"service": name, "did": given["do"]})


def _static(name: str, media_type: str) -> Callable[[Request], Response]:
    body = (_STATIC / name).read_bytes()

    def endpoint(_: Request) -> Response:
        return Response(body, media_type=media_type)

    return endpoint


async def _refused(_: Request, error: Exception) -> Response:
    """What the router says: 404 and 405."""
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, HTTPStatus(error.status_code).name.lower(), error.detail)
    return Response(problem.body, problem.status_code, {**(error.headers or {}), **(problem.headers or {})})


async def _failed(_: Request, error: Exception) -> Response:
    """Answer for a bug of the page.

    The error's text may quote what was sent, so it is not shown.
    """
    problem = Problem(500, "failed", "This is our mistake. Whether something was accepted, the page shows.")
    return Response(problem.body, problem.status_code, problem.headers)


def application(page: Page) -> Starlette:
    """The routes. Connections are `page.connected()`, around it."""
    app = Starlette(
        routes=[
            Route("/", page.page, methods=["GET"]),
            Route("/shop.css", _static("shop.css", "text/css"), methods=["GET"]),
            Route("/shop.js", _static("shop.js", "text/javascript"), methods=["GET"]),
            Route("/icon.svg", _static("icon.svg", "image/svg+xml"), methods=["GET"]),
            Route("/orders", page.new_order, methods=["POST"]),
            Route("/orders/{id:uuid}", page.order, methods=["GET"]),
            Route("/orders/{id:uuid}/events", page.events, methods=["GET"]),
            Route("/orders/{id:uuid}/payments", page.pay, methods=["POST"]),
            Route("/orders/{id:uuid}/state", page.payments.move, methods=["POST"]),
            Route("/services/{name}", page.service, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused, Exception: _failed},
    )
    app.router.redirect_slashes = False
    install(app)
    return app
