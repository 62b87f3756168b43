"""Says of a reused id whether the decoded values are equal.

It reads the first message of the id from its log. A worker calls it after the transaction that stored the dead letters;
without an answer they stay as they are. Limited to a few messages of a batch: where a producer rewrites every message,
the answers are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol
from uuid import UUID

from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord, Partition
from consumer.core.outcome import Outcome
from consumer.postgres import dead_letters, ledger_queries
from consumer.postgres.protocol import Connection
from consumer.transaction.dedupe import conflict_of
from consumer.transaction.identify import equal_values
from consumer.transaction.result import CONFLICT

_COMPARED_MAX = 10  # in one batch
_READ_SECONDS = 2.0


class Log(Protocol):
    """What reads single records."""

    async def record_at(self, partition: Partition, offset: int) -> LogRecord | None: ...


async def explain(connection: Connection, log: Log, outcomes: Mapping[Delivery, Outcome]) -> None:
    """Add to dead letters of reused ids whether the values are equal.

    Raises nothing but a cancellation.
    """
    conflicts = [message for message, outcome in outcomes.items() if outcome is CONFLICT]
    for message in conflicts[:_COMPARED_MAX]:
        try:
            is_equal = await _compare(connection, log, message)
            verdict = conflict_of(is_equal)
            if verdict is not CONFLICT:
                key = (message.handler.number, UUID(bytes=message.id), message.fingerprint)
                await dead_letters.replace_error(connection, *key, before=CONFLICT.error, error=verdict.error)
        except Exception:  # the log or the database does not answer: the lanes wait for them
            return


async def _compare(connection: Connection, log: Log, delivery: Delivery) -> bool | None:
    claimed_by = await ledger_queries.claiming_record(connection, delivery.handler.number, UUID(bytes=delivery.id))
    if claimed_by is None:
        return None
    first = await asyncio.wait_for(log.record_at(*claimed_by), _READ_SECONDS)
    if first is None:
        return None
    return equal_values(Delivery(delivery.handler, first), Delivery(delivery.handler, delivery.record))
