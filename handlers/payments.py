"""Payments: two handlers, each of which applies a payment once."""

from uuid import UUID

import msgspec

from consumer import Message, Tx
from handlers.application import app


class Payment(msgspec.Struct):
    """A payment into an account. amount: cents."""

    payment_id: UUID
    account: int
    amount: int


@app.handler("payments")
async def settle(payment: Payment, tx: Tx) -> None:
    """Book a payment.

    Its result is not needed, so the writes are deferred: those of the whole batch go out together.
    """
    tx.defer(
        "insert into payments (payment_id, account, amount) values ($1, $2, $3)",
        payment.payment_id,
        payment.account,
        payment.amount,
    )
    tx.defer("update accounts set balance = balance + $2 where account = $1", payment.account, payment.amount)


@app.handler("payments", name="receipts")
async def receipt(message: Message[Payment], tx: Tx) -> None:
    """Number the receipts of an account, in the order of the log."""
    tx.defer(
        "insert into receipts (payment_id, account, topic_partition, topic_offset) values ($1, $2, $3, $4)",
        message.value.payment_id,
        message.value.account,
        message.partition,
        message.offset,
    )
