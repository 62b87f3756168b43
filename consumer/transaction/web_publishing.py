"""Publishes in a transaction of the application's own, outside of handlers.

Limitations: sends nothing and never waits for Kafka. Rows are sent by a worker of the same App that serves this
database.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from consumer.core.errors import TransactionMisuse
from consumer.outbox.record import (
    HeadersArgument,
    OutgoingRecord,
    check_size,
    check_topic,
    checked_headers,
    encoded_key,
    encoded_value,
    given_id,
)


class Publishing:
    """What one `async with app.publishing(connection)` publishes."""

    def __init__(self, topics: Mapping[str, int]) -> None:
        self._topics = topics
        self._records: list[OutgoingRecord] | None = []

    def publish(
        self,
        topic: str,
        value: Any,
        key: str | bytes | None = None,
        headers: HeadersArgument = None,
        id: object = None,
    ) -> None:
        """Publish a record to a topic once the transaction has committed.

        It reaches Kafka at least once, under one message id. Records of one key keep their order within the transaction,
        and across transactions if the second began to publish after the first had committed.

        - topic: one of App(publishes=[...]).
        - value: bytes and str as they are, None as a tombstone, anything else as JSON.
        - headers: names with str, bytes or None.
        - id: the message id; by default a random UUID. Give one that a repeated request gives again, and the next App
          applies the message once.

        Raises TransactionMisuse for an undeclared topic, a record of more than 1,048,588 bytes, a reserved or bad header,
        a value that cannot become JSON, and after the block has ended.
        """
        if self._records is None:
            raise TransactionMisuse("publish: the block of `app.publishing` has ended; publish inside of it")
        bytes_max = check_topic(topic, self._topics)
        record = OutgoingRecord(
            topic,
            uuid4().bytes if id is None else given_id(id),
            encoded_key(key),
            encoded_value(value),
            checked_headers(headers),
        )
        check_size(record, bytes_max)
        self._records.append(record)

    def _end(self) -> list[OutgoingRecord]:
        records, self._records = self._records or [], None
        return records


@asynccontextmanager
async def publishing(connection: Any, app: str, topics: Mapping[str, int]) -> AsyncIterator[Publishing]:
    """Yield what publishes, and store it in the connection's open transaction.

    An error in the block stores nothing. Raises TransactionMisuse without an open transaction, Misconfigured where the
    table or the right to insert is missing, and what the driver raises.
    """
    _check_transaction(connection)
    out = Publishing(topics)
    try:
        yield out
    except BaseException:
        out._end()
        raise
    if records := out._end():
        _check_transaction(connection)
        from consumer.postgres import (
            outbox_intake,
        )  # here: the pytest plugin imports this file and must not load the driver

        await outbox_intake.put(connection, app, records)


def _check_transaction(connection: Any) -> None:
    is_in_transaction = getattr(connection, "is_in_transaction", None)
    if is_in_transaction is None:
        raise TransactionMisuse(
            f"publishing: a {type(connection).__name__} is no connection of asyncpg; give the one that your transaction is "
            "open on (in a handler, use tx.publish)"
        )
    if not is_in_transaction():
        raise TransactionMisuse(
            "publishing: no transaction is open, so the message could be stored without your writes; publish inside of "
            "`async with connection.transaction():`"
        )
