"""Says of a reused id whether the decoded values are equal.

It reads the first message of the id from its log. A worker calls it after the transaction that stored the dead letters;
without an answer they stay as they are. Limited to a few messages of a batch: where a producer rewrites every message, the
answers are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol
from uuid import UUID

from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord, Partition
from consumer.core.outcome import Outcome
from consumer.transaction.dedupe import conflict_of
from consumer.transaction.identify import equal_values
from consumer.transaction.result import CONFLICT

_COMPARED_MAX = 10  # in one batch
_READ_SECONDS = 2.0

_FIRST = """
select t.name, l.partition, l."offset" from consumer.ledger l join consumer.topics t using (topic)
where l.handler = $1 and l.id = $2 and l."offset" >= 0
"""
_SAY = """
update consumer.dead_letters set error = $4 where handler = $1 and id = $2 and fingerprint = $3 and error = $5
"""


class Log(Protocol):
    """What reads single records."""

    async def record_at(self, partition: Partition, offset: int) -> LogRecord | None: ...


async def explain(connection: Any, log: Log, outcomes: Mapping[Delivery, Outcome]) -> None:
    """Add to dead letters of reused ids whether the values are equal.

    Raises nothing but a cancellation.
    """
    conflicts = [message for message, outcome in outcomes.items() if outcome is CONFLICT]
    for message in conflicts[:_COMPARED_MAX]:
        try:
            is_equal = await _compare(connection, log, message)
            verdict = conflict_of(is_equal)
            if verdict is not CONFLICT:
                place = (message.handler.number, UUID(bytes=message.id), message.fingerprint)
                await connection.execute(_SAY, *place, verdict.error, CONFLICT.error)
        except Exception:  # the log or the database does not answer: the lanes wait for them
            return


async def _compare(connection: Any, log: Log, delivery: Delivery) -> bool | None:
    row = await connection.fetchrow(_FIRST, delivery.handler.number, UUID(bytes=delivery.id))
    if row is None:
        return None
    partition = Partition(row[0], row[1])
    first = await asyncio.wait_for(log.record_at(partition, row[2]), _READ_SECONDS)
    if first is None:
        return None
    return equal_values(Delivery(delivery.handler, first), Delivery(delivery.handler, delivery.record))
