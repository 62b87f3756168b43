"""Refunds: a read decides.

What can never be right is rejected; what may become right later is retried.
"""

from uuid import UUID

import msgspec

from consumer import Message, Reject, Retry, Tx
from handlers.application import app


class Refund(msgspec.Struct):
    """Gives back (a part of) a payment. amount: cents."""

    refund_id: UUID
    payment_id: UUID
    amount: int


class PaymentNotSettled(Exception):
    """The payment may still come: topics have no order among each other."""


@app.handler("refunds", message_id="field:refund_id", retry=Retry(attempts=6, base=0.2, cap=30))
async def refund(message: Message[Refund], tx: Tx) -> None:
    """Give the money back once, and never more than was paid."""
    wanted = message.value
    if wanted.amount <= 0:
        raise Reject("a refund needs a positive amount")
    paid = await tx.fetchrow(
        "select account, amount - refunded as left from payments where payment_id = $1 for update", wanted.payment_id
    )
    if paid is None:
        raise PaymentNotSettled("no payment of that id yet")
    if wanted.amount > paid["left"]:
        raise Reject("more than is left of the payment")
    tx.defer("update payments set refunded = refunded + $2 where payment_id = $1", wanted.payment_id, wanted.amount)
    tx.defer("update accounts set balance = balance - $2 where account = $1", paid["account"], wanted.amount)
