"""An App whose handler does to a message what table `faults` says.

So tests, other processes and operators' commands can change it. Each run of the handler is written to a file.
"""

from __future__ import annotations

import os

import msgspec

from consumer import App, Message, Reject, Retry, Tx

TABLES = """
create table faults (id text primary key, kind text not null);
create table done (n serial, id text not null, amount int not null);   -- no key: doubles must show
"""


class Payment(msgspec.Struct):
    id: str
    amount: int


def make(name: str, topic: str, attempts: int = 1, base: float = 0.01) -> App:
    app = App(name)

    @app.handler(topic, retry=Retry(attempts=attempts, base=base, cap=base))
    async def settle(message: Message[Payment], tx: Tx) -> None:
        payment = message.value
        if calls := os.environ.get("TEST_CALLS"):
            descriptor = os.open(calls, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.write(descriptor, f"{payment.id}\n".encode())
            os.close(descriptor)
        await tx.execute("insert into done (id, amount) values ($1, $2)", payment.id, payment.amount)
        match await tx.fetchval("select kind from faults where id = $1", payment.id):
            case "fails":
                raise ValueError(f"no account {payment.amount} for {payment.id!r}")
            case "rejected":
                raise Reject("not wanted")
            case "constraint":
                await tx.execute("insert into done (id, amount) values ($1, null)", payment.id)
            case "swallowed":
                try:
                    await tx.execute("select 1 / 0")
                except Exception:
                    pass

    return app


if "TEST_TOPIC" in os.environ:
    app = make(
        os.environ["TEST_APP"],
        os.environ["TEST_TOPIC"],
        int(os.environ.get("TEST_ATTEMPTS", "1")),
        float(os.environ.get("TEST_BASE", "0.01")),
    )
