"""Publishes in a transaction of the application's own, outside of handlers.

Limitations: sends nothing and never waits for Kafka. Rows are sent by a worker of the same App that serves this
database.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from consumer.core.errors import TransactionMisuse
from consumer.outbox.encoding import EncodeFunction, encoded
from consumer.outbox.new_ids import new_message_id
from consumer.outbox.record import (
    HeadersArgument,
    OutgoingRecord,
    check_size,
    check_topic,
    encoded_key,
    given_id,
)

_ENDED = (
    "publishing: the transaction ended inside of the block, and its messages are not stored; commit after `async with "
    "app.publishing(...)`"
)


class Publishing:
    """What one `async with app.publishing(connection)` publishes."""

    def __init__(self, topics: Mapping[str, int], encode: EncodeFunction | None = None) -> None:
        self._topics = topics
        self._encode = encode
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
        - value: bytes and str as they are, None as a tombstone, anything else as JSON; with App(encode=…) as that says.
        - headers: names with str, bytes or None.
        - id: the message id; by default a new one (`new_message_id`). Give one that a repeated request gives again, and the next App
          applies the message once.

        Raises TransactionMisuse for an undeclared topic, a record of more than 1,048,588 bytes, a reserved or bad header,
        a value that cannot become JSON, and after the block has ended.
        """
        if self._records is None:
            raise TransactionMisuse("publish: the block of `app.publishing` has ended; publish inside of it")
        bytes_max = check_topic(topic, self._topics)
        body, own = encoded(topic, value, headers, self._encode)
        message_id = new_message_id().bytes if id is None else given_id(id)
        record = OutgoingRecord(topic, message_id, encoded_key(key), body, own)
        check_size(record, bytes_max)
        self._records.append(record)

    def _end(self) -> list[OutgoingRecord]:
        records, self._records = self._records or [], None
        return records


@asynccontextmanager
async def publishing(
    given: Any, app: str, topics: Mapping[str, int], encode: EncodeFunction | None = None
) -> AsyncIterator[Publishing]:
    """Yield what publishes, and store it in the open transaction.

    given: a connection of asyncpg, or SQLAlchemy's AsyncSession or AsyncConnection on one. An error in the block stores
    nothing. Raises TransactionMisuse without an open transaction, Misconfigured where the table or the right to insert is
    missing, and what the driver raises.
    """
    connection, transaction = await _open_transaction(given)
    out = Publishing(topics, encode)
    try:
        yield out
    except BaseException:
        out._end()
        raise
    if records := out._end():
        from consumer.postgres import (
            outbox_intake,
        )  # here: the pytest plugin imports this file and must not load the driver

        # SQLAlchemy would begin another one by itself, which stays uncommitted.
        if transaction is not None and _sync_of(given).get_transaction() is not transaction:
            raise TransactionMisuse(_ENDED)
        _check_transaction(connection)
        await outbox_intake.put(connection, app, records)


async def _open_transaction(given: Any) -> tuple[Any, Any]:
    """Return the connection of asyncpg, and SQLAlchemy's transaction.

    SQLAlchemy begins by itself, in PostgreSQL with its first statement.
    """
    sqlalchemy = sys.modules.get("sqlalchemy.ext.asyncio")  # loaded, if an object of it is given
    if sqlalchemy is None or not isinstance(
        given, sqlalchemy.AsyncSession | sqlalchemy.async_scoped_session | sqlalchemy.AsyncConnection
    ):
        _check_transaction(given)
        return given, None
    connection = given if isinstance(given, sqlalchemy.AsyncConnection) else await given.connection()
    raw = (await connection.get_raw_connection()).driver_connection
    if hasattr(raw, "is_in_transaction") and not raw.is_in_transaction():
        await connection.exec_driver_sql("select 1")
    _check_transaction(raw)
    return raw, _sync_of(given).get_transaction()


def _sync_of(given: Any) -> Any:
    """Return the object that a session or connection of SQLAlchemy stands for."""
    session = given() if hasattr(given, "registry") else given  # of a scope
    return getattr(session, "sync_session", None) or session.sync_connection


def _check_transaction(connection: Any) -> None:
    is_in_transaction = getattr(connection, "is_in_transaction", None)
    if is_in_transaction is None:
        raise TransactionMisuse(
            f"publishing: a {type(connection).__name__} is no connection of asyncpg; give the one that your transaction is "
            "open on, or SQLAlchemy's AsyncSession on one (in a handler, use tx.publish)"
        )
    if not is_in_transaction():
        raise TransactionMisuse(
            "publishing: no transaction is open, so the message could be stored without your writes; publish inside of "
            "`async with connection.transaction():`, with SQLAlchemy without AUTOCOMMIT"
        )
