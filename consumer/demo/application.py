"""The application of the demo: one handler, which publishes receipts."""

from uuid import UUID

import msgspec

from consumer import App, Tx

app = App("demo", publishes=["receipts"])


class Payment(msgspec.Struct):
    """A payment into an account. amount: cents."""

    payment_id: UUID
    account: int
    amount: int


@app.handler("payments")
async def settle(payment: Payment, tx: Tx) -> None:
    """Apply a payment.

    Without key, check or `on conflict`: a payment that is applied twice shows in the balance.
    """
    tx.defer(
        "insert into payments values ($1, $2, $3)",
        payment.payment_id,
        payment.account,
        payment.amount,
    )
    tx.defer("update accounts set balance = balance + $2 where account = $1", payment.account, payment.amount)
    tx.publish("receipts", payment, key=str(payment.account))
