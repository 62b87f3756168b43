"""Clicks, which are not worth a ledger row.

A handler that opts out is called at least once, and gets no transaction.
"""

from typing import TypedDict

from consumer import Message
from handlers.application import Clicks, app


class Click(TypedDict):
    """A page that was looked at."""

    page: str


@app.handler("clicks", idempotent=False)
async def count(click: Message[Click], clicks: Clicks) -> None:
    """`clicks` is what the App's lifespan yields under that name."""
    clicks.pages[click.value["page"]] += 1
