"""The App of most tests on real services: payments and balances.

Its tables are those of harness.TABLES.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from harness import Sent

from consumer import App, Reject, Retry, Tx

INSERT = "insert into effects values ($1, $2, $3)"
UPDATE = "update accounts set balance = balance + $2 where id = $1"
QUICK = Retry(attempts=2, base=0.01, cap=0.05)
SAME_AS_NAME = object()  # the default of payment(id=): the message id is the payment's name


class Payment(msgspec.Struct):
    """The payload."""

    id: str
    account: int
    amount: int


def payment(
    name: str,
    account: int = 1,
    amount: int = 10,
    *,
    id: object = SAME_AS_NAME,
    key: str | None = None,
    partition: int | None = None,
) -> Sent:
    """A message with one payment.

    id: the message id, None for a message without one.
    key: that of the account by default, so that the payments of an account keep their order.
    """
    given = None if id is None else name if id is SAME_AS_NAME else str(id)
    body = {"id": name, "account": account, "amount": amount}
    return Sent(body, id=given, key=str(account) if key is None else key, partition=partition)


def payments_app(*topics: str, name: str | None = None, balances: bool = True, **options: Any) -> App:
    """Build an App with handlers `settle`, `settle1` and so on.

    They reject negative amounts.

    name: by default one that no other test has.
    balances: whether the handlers also add to the balance of the account; its row is then locked until the COMMIT.
    options: of the handlers.
    """
    app = App(name or f"payments-{uuid.uuid4().hex[:8]}")
    for number, topic in enumerate(topics):

        @app.handler(topic, name=f"settle{number or ''}", **options)
        async def settle(payment: Payment, tx: Tx) -> None:
            if payment.amount < 0:
                raise Reject("negative")
            tx.defer(INSERT, payment.id, payment.account, payment.amount)
            if balances:
                tx.defer(UPDATE, payment.account, payment.amount)

    return app


def lone_payment(name: str, partition: int = 0, *, id: object = SAME_AS_NAME) -> Sent:
    """A payment with its own key, so it waits for none."""
    return payment(name, amount=1, id=id, key=name, partition=partition)
