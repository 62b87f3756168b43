"""The payments API: a tap becomes a message, and orders advance.

Read `pay` first: token and ledger are both there, and order and message commit together. Every invalid request is answered
as problem+json (RFC 9457), and charges nothing. Limitations: Kafka is not asked, so a message may reach it later; whether
it was charged is unknown here, so no answer to a tap says it.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import asyncpg
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from consumer.schemes.database import NotFound
from consumer.schemes.states import NotMoved
from consumer.schemes.tokens import Tokens
from consumer.schemes.unique import insert_once
from consumer.schemes.versioned import Stale, update_versioned
from consumer.schemes.web import Problem, TokenTaps
from handlers.shop.application import ORDERS, app
from handlers.shop.log_watch import TAP
from handlers.shop.orders import Order, Orders, Sent, Tap, cents, money
from handlers.shop.requests import body_of, has_own_token, is_form, visitor_of
from handlers.shop.view import topic_of

TOKENS_SECONDS = 2.0
DATABASE_SECONDS = 2.0
_AGAIN_SECONDS = 8.0  # longer than an answer takes: the first, the second to connect and for each statement
_VERSION_MAX = 2**63 - 1
DATABASE_AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class PaymentsApi:
    """Pays and moves orders.

    `pool` is set while the page is connected.
    """

    def __init__(self, orders: Orders, tokens: Tokens) -> None:
        self.pool: Any = None
        self._orders = orders
        # Bound to the order as well: one's own token of another order is foreign here.
        self._taps = TokenTaps(tokens, self._subject, field="token", again_after_seconds=_AGAIN_SECONDS)

    async def pay(self, request: Request, order: Order, tap: Tap) -> Response:
        """Store the order and the message of a valid tap.

        202: both are committed, and nothing is charged yet.
        """
        given = await body_of(request)
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
                is_its_own = await has_own_token(request, order)
                if problem.code == "token_unknown" and is_its_own and not order.sent:
                    self._orders.close(
                        order
                    )  # expired or lost: no one can pay it, so the page loaded next shows another
                if problem.code != "tokens_unavailable" or not order.switches.ledger or not is_its_own:
                    raise
                # Redis is away, and the ledger is behind: the message id is derived from the token alone.
                order.unchecked, answered = True, None
            else:
                order.redeemed_by = order.redeemed_by or tap.number
        elif order.switches.token and not order.switches.ledger:
            raise Problem(503, "tokens_unavailable", "Redis was away when this order was made: make a new one.", 1)
        sent = order.send(message_id or str(uuid4()))
        try:
            await self._store(order, sent, amount)
        except DATABASE_AWAY:
            again = (
                "Tapping again is safe: it is the same message id."
                if order.switches.ledger
                else "If it was, another tap is charged, too."
            )
            raise Problem(
                503, "database_unavailable", f"PostgreSQL does not confirm: perhaps not accepted. {again}", 2
            ) from None
        sent.is_stored = True
        tap.text = "accepted, not yet charged"
        response = JSONResponse(
            {
                "state": "accepted",
                "detail": "Accepted, not yet charged.",
                "amount": money(amount),
                "message_id": sent.message_id,
            },
            202,
        )
        return await answered.answer(response) if answered is not None else response

    async def _store(self, order: Order, sent: Sent, amount: int) -> None:
        """Commit a new order and the message that charges it."""
        row = {"order_id": order.id, "visitor": order.visitor, "protected": order.switches.ledger, "amount": amount}
        async with self.pool.acquire(timeout=DATABASE_SECONDS) as connection, connection.transaction():
            await insert_once(connection, "shop.orders", row, conflict="order_id")
            async with app.publishing(connection) as out:
                out.publish(
                    topic_of(order),
                    {"order": order.id, "visitor": order.visitor, "amount": amount},
                    key=order.id.bytes,
                    headers={TAP: sent.tap.bytes},
                    id=sent.message_id,
                )

    async def _subject(self, request: Request) -> str | None:
        visitor = visitor_of(request)
        return f"{visitor}/{request.path_params['id']}" if visitor is not None else None

    async def move(self, request: Request) -> Response:
        """Move an order on (shipped, delivered), unless it has changed meanwhile.

        `version` is that of the page; without it, the answer is 428.
        """
        order = self.find_order(request)
        if is_form(request):
            raise Problem(415, "media_type", "Send application/json.")
        given = await body_of(request)
        to, version = given.pop("state", None), given.pop("version", None)
        if not isinstance(to, str) or to not in ORDERS.moves.moves:
            raise Problem(422, "state_unknown", f"state: one of {', '.join(ORDERS.moves.moves)}")
        if version is None:
            raise Problem(428, "version_missing", "version: the one that you have seen, so that no one's work is lost.")
        if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < _VERSION_MAX:
            raise Problem(422, "version_invalid", "version: a whole number, at least 0")
        if given:
            raise Problem(422, "field_unknown", f"There is no field {sorted(given)[0][:40]!r} in a move.")
        if to in ("placed", "paid"):
            raise Problem(409, "move_illegal", "Only a charge makes an order paid.")
        try:
            async with self.pool.acquire(timeout=DATABASE_SECONDS) as connection, connection.transaction():
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
        except DATABASE_AWAY:
            raise Problem(
                503, "database_unavailable", "PostgreSQL does not answer. See the state, then try again.", 1
            ) from None
        return JSONResponse({"state": to, "version": version})

    def find_order(self, request: Request) -> Order:
        visitor = visitor_of(request)
        order = self._orders.find(request.path_params["id"], visitor) if visitor is not None else None
        if order is None:
            raise Problem(404, "order_unknown", "There is no such order of yours. Load the page again.")
        return order
