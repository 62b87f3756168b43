"""The payment page: what people and scripts may ask of it. It produces messages; a worker elsewhere charges.

Read `_pay` first: the recommended pair is there. Whatever a client sends wrong is told as problem+json (RFC 9457), and
charges nothing. What it does not know: whether a message that Kafka took was charged. It looks that up for the page, and
never says so in an answer to a tap.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from http import HTTPStatus
from pathlib import Path
from string import Template
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from consumer.kafka.producer import open_producer
from consumer.local_servers import EmbeddedUnavailable
from consumer.schemes.database import NotFound
from consumer.schemes.redis_call import RedisAway
from consumer.schemes.states import NotMoved
from consumer.schemes.tokens import Tokens
from consumer.schemes.versioned import Stale, update_versioned
from consumer.schemes.web import Answered, Problem, TokenTaps, install
from handlers.shop.application import ORDERS
from handlers.shop.orders import Order, Orders, Sent, Switches, Tap, cents, money, switches
from handlers.shop.running import Running
from handlers.shop.view import Seen, Services, is_waiting, told, topic_of

_STATIC = Path(__file__).with_name("static")
_COOKIE = "shop_visitor"
_KAFKA_SECONDS = 2.0
_TOKENS_SECONDS = 2.0
_AGAIN_SECONDS = 6.0  # longer than an answer takes: both of the above, and a little
_DATABASE_SECONDS = 2.0
_LOOK_SECONDS = (0.1, 0.5)  # between two looks at an order: while something is on its way, and else
_PROBE_SECONDS = 0.5
_HEARTBEAT_SECONDS = 10.0
_WATCHERS_MAX = 40
_VERSION_MAX = 2**63 - 1
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
    """The web application's state: connections, orders, and what was last seen of the services."""

    def __init__(self, running: Running, token_seconds: float) -> None:
        self.running = running
        self.orders = Orders()
        self.stopping = asyncio.Event()
        self._token_seconds = token_seconds
        self._redis = Redis.from_url(running.valkey.url)
        self._tokens = Tokens(self._redis, prefix="shop:token:", budget_seconds=_TOKENS_SECONDS)
        # Bound to the order as well: one's own token of another order is foreign here.
        self._taps = TokenTaps(self._tokens, self._subject, field="token", again_after_seconds=_AGAIN_SECONDS)
        self._pool: Any = None
        self._producer: Any = None
        self._sending: set[asyncio.Task[None]] = set()
        self._watchers = 0
        self._kafka = self._redis_up = True
        self._template = Template((_STATIC / "page.html").read_text("utf-8"))

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Connections to all services, for as long as the block lasts."""
        dsn = self.running.settings.dsn
        async with (
            asyncpg.create_pool(dsn, min_size=0, max_size=8, command_timeout=_DATABASE_SECONDS) as self._pool,
            open_producer(self.running.settings) as self._producer,
        ):
            probing = asyncio.create_task(self._probe())
            try:
                yield
            finally:
                self.running.thaw()  # else the producer would wait for it
                for task in [probing, *self._sending]:
                    task.cancel()
                await asyncio.gather(probing, *self._sending, return_exceptions=True)
                await self._redis.aclose()

    # -- pages ------------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page, with the visitor's open order; a new one where there is none."""
        visitor = _visitor(request)
        if visitor is None:
            visitor = uuid4()
        order = self.orders.open(visitor)
        if order is None:
            order = await self._new_order(visitor, Switches())
        return await self._render(order)

    async def _render(self, order: Order, status: int = 200, notice: str = "") -> Response:
        found = await self._told(order)
        layers = order.switches
        values = {
            "order": str(order.id),
            "token": order.token or "",
            "notice": notice,
            "verdict": found["verdict"]["text"],
            "balance": f"{found['account']['name']}: {found['account']['balance'] or 'cannot be told now'}",
            "greying_on": "checked" if layers.greying else "",
            "token_on": "checked" if layers.token else "",
            "ledger_on": "checked" if layers.ledger else "",
        }
        body = self._template.substitute({name: html.escape(value) for name, value in values.items()})
        response = Response(body, status, media_type="text/html")
        response.set_cookie(_COOKIE, order.visitor.hex, httponly=True, samesite="strict", max_age=86_400)
        return response

    async def new_order(self, request: Request) -> Response:
        """Another order, under the given switches. It is the one that the visitor's page shows from then on."""
        visitor = _visitor(request)
        if visitor is None:
            raise Problem(403, "nobody", "Load the page first: it makes a visitor of you.")
        given = await _body(request)
        as_form = _is_form(request)
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
        """A tap. 202: Kafka has the message, and nothing is charged yet; any other answer is a problem."""
        order = self._order(request)
        tap = order.tap()
        try:
            response = await self._pay(request, order, tap)
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
        if not _is_form(request):
            return response
        # Without JavaScript. No redirect: a reload sends it again, which the page is there to show.
        told = json.loads(bytes(response.body))
        return await self._render(order, response.status_code, f"Answer {response.status_code}: {told['detail']}")

    async def _pay(self, request: Request, order: Order, tap: Tap) -> Response:
        given = await _body(request)
        given.pop("token", None)  # of the form; the header's name is Idempotency-Key
        try:
            amount = cents(given.pop("amount", None))
        except ValueError as error:
            raise Problem(422, "amount_invalid", str(error)) from None
        if given:
            raise Problem(422, "field_unknown", f"There is no field {sorted(given)[0][:40]!r} in a payment.")
        # Valid, so the token may be used up now.
        message_id, answered = order.message_id, None
        if order.token is not None:
            answered = await self._taps(request)
            try:
                await answered.redeem(str(amount).encode())
            except Problem as problem:
                is_its_own = await _has(request, order)
                if problem.code == "token_unknown" and is_its_own and not order.sent:
                    self.orders.close(
                        order
                    )  # expired or lost: nobody can pay it, so the page loaded next shows another
                if problem.code != "tokens_unavailable" or not order.switches.ledger or not is_its_own:
                    raise
                # Redis is away, and the ledger is behind: the message id is derived from the token alone.
                order.unchecked, answered = True, None
            else:
                order.redeemed_by = order.redeemed_by or tap.number
        elif order.switches.token and not order.switches.ledger:
            raise Problem(503, "tokens_unavailable", "Redis was away when this order was made: make a new one.", 1)
        sent = order.send(message_id or str(uuid4()))
        body = msgspec.json.encode({"order": order.id, "visitor": order.visitor, "amount": amount})
        task = asyncio.create_task(self._send(order, sent, body))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        await asyncio.wait({task}, timeout=_KAFKA_SECONDS)
        if sent.place is None:
            again = (
                "Tapping again is safe: it is the same message id."
                if order.switches.ledger
                else "It may come late, and with another tap be charged twice."
            )
            raise Problem(503, "kafka_unconfirmed", f"Kafka does not confirm: not accepted, not charged. {again}", 2)
        tap.text = "accepted, not yet charged"
        response = JSONResponse(
            {
                "state": "accepted",
                "detail": "Accepted, not yet charged.",
                "amount": money(amount),
                "message_id": sent.message_id,
                "partition": sent.place[0],
                "offset": sent.place[1],
            },
            202,
        )
        return await answered.answer(response) if answered is not None else response

    async def _send(self, order: Order, sent: Sent, body: bytes) -> None:
        """Give it to Kafka, for as long as the client tries. Never cancelled by an answer that would not wait."""
        headers = [("message-id", sent.message_id.encode())]
        try:
            found = await self._producer.send_and_wait(topic_of(order), body, key=order.id.bytes, headers=headers)
        except Exception as error:  # whatever the client raises: it may have arrived all the same
            logging.getLogger("shop").warning("kafka did not confirm a message: %s", type(error).__name__)
            sent.given_up = True
        else:
            sent.place = (found.partition, found.offset)

    async def _subject(self, request: Request) -> str | None:
        visitor = _visitor(request)
        return f"{visitor}/{request.path_params['id']}" if visitor is not None else None

    # -- the order's state ------------------------------------------------------------------------------------------

    async def move(self, request: Request) -> Response:
        """Move an order on (shipped, delivered), if it is still as the page has shown it: `version`, or 428."""
        order = self._order(request)
        if _is_form(request):
            raise Problem(415, "media_type", "Send application/json.")
        given = await _body(request)
        to, version = given.pop("state", None), given.pop("version", None)
        if not isinstance(to, str) or to not in ORDERS.moves.moves:
            raise Problem(422, "state_unknown", f"state: one of {', '.join(ORDERS.moves.moves)}")
        if version is None:
            raise Problem(428, "version_missing", "version: the one that you have seen, so that nobody's work is lost.")
        if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < _VERSION_MAX:
            raise Problem(422, "version_invalid", "version: a whole number, at least 0")
        if given:
            raise Problem(422, "field_unknown", f"There is no field {sorted(given)[0][:40]!r} in a move.")
        if to in ("placed", "paid"):
            raise Problem(409, "move_illegal", "Only a charge makes an order paid.")
        try:
            async with self._pool.acquire(timeout=_DATABASE_SECONDS) as connection, connection.transaction():
                if await ORDERS.move(connection, order.id, to, early="reject"):
                    # Another's change meanwhile raises Stale, and so undoes the move.
                    now = await connection.fetchval("select now()")
                    version = await update_versioned(
                        connection, "shop.orders", {"order_id": order.id}, expected=version, set={"moved_at": now}
                    )
                else:  # it is there already: a repetition, which is answered like the first
                    version = await connection.fetchval("select version from shop.orders where order_id = $1", order.id)
        except Stale as stale:
            raise Problem(409, "version_stale", f"It has changed: it is at version {stale.found} by now.") from None
        except NotMoved as error:
            raise Problem(409, "move_illegal", f"From {error.current!r} it cannot become {to!r} now.") from None
        except NotFound:
            raise Problem(409, "not_charged", "It is not in the database yet.") from None
        except _DATABASE_AWAY:
            raise Problem(
                503, "database_unavailable", "PostgreSQL does not answer. See the state, then try again.", 1
            ) from None
        return JSONResponse({"state": to, "version": version})

    # -- what is seen -----------------------------------------------------------------------------------------------

    async def order(self, request: Request) -> Response:
        """The order as the page shows it, once."""
        return JSONResponse(await self._told(self._order(request)))

    async def events(self, request: Request) -> Response:
        """The same by server-sent events: at once, and whenever it changes."""
        order = self._order(request)
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._watchers >= _WATCHERS_MAX:
            raise Problem(503, "too_many_watchers", "Too many pages are open.", 5)
        return StreamingResponse(self._changes(order), media_type="text/event-stream")

    async def _changes(self, order: Order) -> AsyncIterator[str]:
        self._watchers += 1
        clock = asyncio.get_running_loop().time
        last, told_at = "", clock()
        try:
            while not self.stopping.is_set():
                seen = await self._seen(order)
                found = json.dumps(self._view(order, seen))
                if found != last or clock() - told_at > _HEARTBEAT_SECONDS:
                    yield f"data: {found}\n\n" if found != last else ": nothing new\n\n"
                    last, told_at = found, clock()
                try:
                    await asyncio.wait_for(self.stopping.wait(), _LOOK_SECONDS[0 if is_waiting(order, seen) else 1])
                except TimeoutError:
                    continue
        finally:
            self._watchers -= 1

    async def _told(self, order: Order) -> dict[str, Any]:
        return self._view(order, await self._seen(order))

    def _view(self, order: Order, seen: Seen | None) -> dict[str, Any]:
        services = Services(self._kafka, seen is not None, self._redis_up, self.running.worker.pid)
        return told(order, seen, services, self.running.worker.causes(topic_of(order)))

    async def _seen(self, order: Order) -> Seen | None:
        """What PostgreSQL holds now; None when it does not say."""
        try:
            async with self._pool.acquire(timeout=_DATABASE_SECONDS) as connection:
                text = await connection.fetchval(
                    _SEEN, order.id, order.visitor, order.switches.ledger, topic_of(order), order.id.bytes
                )
        except _DATABASE_AWAY:
            return None
        found = json.loads(text)
        charges: dict[tuple[int, int], int] = {}
        for partition, offset, _ in found["charges"] or []:
            charges[partition, offset] = charges.get((partition, offset), 0) + 1
        return Seen(
            charges=charges,
            charged=sum(amount for _, _, amount in found["charges"] or []),
            positions=dict(found["positions"] or []),
            letters={(partition, offset): reason for partition, offset, reason in found["letters"] or []},
            **(found["order"] or {}),
            **({"balance": found["balance"]} if found["balance"] is not None else {}),
        )

    async def _probe(self) -> None:
        while True:
            running = self.running
            self._kafka = running.kafka_runs() and await asyncio.to_thread(running.tansu.answers)
            self._redis_up = running.redis_runs() and await asyncio.to_thread(running.valkey.answers)
            await asyncio.sleep(_PROBE_SECONDS)

    # -- faults -----------------------------------------------------------------------------------------------------

    async def service(self, request: Request) -> Response:
        """Stop or start a service, or kill the worker: to see what the page says then."""
        name = request.path_params["name"]
        if name not in _SERVICES:
            raise Problem(404, "service_unknown", f"There are {', '.join(_SERVICES)}.")
        if _visitor(request) is None:
            raise Problem(403, "nobody", "Load the page first: it makes a visitor of you.")
        given = await _body(request)
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
        return RedirectResponse("/", 303) if _is_form(request) else JSONResponse({"service": name, "did": given["do"]})

    def _order(self, request: Request) -> Order:
        visitor = _visitor(request)
        found = self.orders.find(request.path_params["id"], visitor) if visitor is not None else None
        if found is None:
            raise Problem(404, "order_unknown", "There is no such order of yours. Load the page again.")
        return found


_DATABASE_AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


def _visitor(request: Request) -> UUID | None:
    text = request.cookies.get(_COOKIE, "")
    try:
        return UUID(hex=text) if len(text) == 32 else None
    except ValueError:
        return None


def _is_form(request: Request) -> bool:
    return _media_type(request) == "application/x-www-form-urlencoded"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


_decoder = msgspec.json.Decoder(float_hook=Decimal)


async def _body(request: Request) -> dict[str, Any]:
    """The body's fields. Raises Problem: 415, 400, 422."""
    if _is_form(request):
        try:
            pairs = (await request.form()).multi_items()
        except HTTPException as error:  # too many fields, for example
            raise Problem(error.status_code, "form_malformed", error.detail) from None
        found: dict[str, Any] = dict(pairs)
        if len(found) < len(pairs):
            raise Problem(422, "field_repeated", "A field stands there twice.")
        return found
    if _media_type(request) != "application/json":
        raise Problem(415, "media_type", "Send application/json, or a form that is application/x-www-form-urlencoded.")
    try:
        decoded = _decoder.decode(await request.body())
    except (msgspec.DecodeError, RecursionError, ValueError, ArithmeticError):
        raise Problem(400, "json_malformed", "The body is not JSON.") from None
    if not isinstance(decoded, dict):
        raise Problem(422, "not_an_object", "The body is JSON, but no object.")
    return decoded


async def _has(request: Request, order: Order) -> bool:
    """Whether the request brings this order's own token."""
    given = request.headers.get("idempotency-key")
    if given is None:
        given = str((await request.form()).get("token", ""))
    return hmac.compare_digest(given.strip('"').encode(), (order.token or "").encode())


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
    """A mistake of ours. Its text may quote what was sent, so it is not told."""
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
            Route("/orders/{id:uuid}/state", page.move, methods=["POST"]),
            Route("/services/{name}", page.service, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused, Exception: _failed},
    )
    app.router.redirect_slashes = False
    install(app)
    return app
