"""Bookings: hundreds in one statement.

A batch handler gets a list from which duplicates are already removed.
"""

import msgspec

from consumer import Tx
from handlers.application import app


class Entry(msgspec.Struct):
    """One side of a booking. amount: cents, negative for the credit side."""

    entry_id: str
    account: int
    amount: int


@app.handler("ledger", message_id="field:entry_id", batch=500)
async def book(entries: list[Entry], tx: Tx) -> None:
    """One INSERT for all of them."""
    await tx.execute(
        "insert into bookings (entry_id, account, amount) select * from unnest($1::text[], $2::int[], $3::bigint[])",
        [entry.entry_id for entry in entries],
        [entry.account for entry in entries],
        [entry.amount for entry in entries],
    )
