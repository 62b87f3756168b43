"""The page's worker: one handler with the ledger, one without.

Both book alike: nothing in `_book` checks whether the order is charged already. Limitations: it does not know how often
the button was tapped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from consumer import App, Message, RunAgain, Tx
from consumer.schemes.states import StateMachine, TooLate
from consumer.settings import load

TOPIC = "shop-payments"
SANDBOX_TOPIC = "shop-sandbox"
START_BALANCE = 1000_00  # cents; an account is made by its first charge

ORDERS = StateMachine(
    "shop.orders",
    "state",
    {"placed": {"paid"}, "paid": {"shipped"}, "shipped": {"delivered"}, "delivered": ()},
    key="order_id",
)


class Payment(msgspec.Struct):
    """What a tap asks for. amount: cents."""

    order: UUID
    visitor: UUID
    amount: int


class Bank:
    """The sandbox's own connections.

    A handler that opted out gets no transaction of the worker's.
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool


@asynccontextmanager
async def resources(app: App) -> AsyncIterator[dict[str, object]]:
    """Make the resources of a worker process.

    No connection is opened before it is needed: PostgreSQL may be away.
    """
    async with asyncpg.create_pool(load().dsn, min_size=0, max_size=2, command_timeout=10) as pool:
        yield {"bank": Bank(pool)}


app = App("shop", lifespan=resources, publishes=[TOPIC, SANDBOX_TOPIC])


@app.handler(TOPIC)
async def charge(message: Message[Payment], tx: Tx) -> None:
    """Protected: a message id that was applied before never comes here."""
    await _book(tx, message, protected=True)


@app.handler(SANDBOX_TOPIC, idempotent=False)
async def charge_unprotected(message: Message[Payment], bank: Bank) -> None:
    """The sandbox: charge at least once, in a transaction of its own.

    What comes twice is charged twice.
    """
    try:
        async with bank.pool.acquire(timeout=5) as connection, connection.transaction():
            await _book(connection, message, protected=False)
    except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError) as error:
        raise RunAgain("PostgreSQL is away") from error  # an outage is not the message's fault


async def _book(database: Any, message: Message[Payment], *, protected: bool) -> None:
    payment = message.value
    # Paid is paid, however often: a state does not count. Therefore it is not asked whether to charge.
    with suppress(TooLate):
        await ORDERS.move(database, payment.order, "paid")
    await database.execute("update shop.orders set version = version + 1 where order_id = $1", payment.order)
    await database.execute(
        "insert into shop.charges (order_id, protected, amount, topic_partition, topic_offset) values ($1, $2, $3, $4, $5)",
        payment.order,
        protected,
        payment.amount,
        message.partition,
        message.offset,
    )
    await database.execute(
        """insert into shop.accounts as a (visitor, protected, balance) values ($1, $2, $3::bigint - $4::bigint)
           on conflict (visitor, protected) do update set balance = a.balance - $4::bigint""",
        payment.visitor,
        protected,
        START_BALANCE,
        payment.amount,
    )
