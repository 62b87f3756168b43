"""What the tables say of messages. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from consumer.core.delivery import Delivery
from consumer.core.message import Partition
from consumer.core.message_state import NOTHING, StoredState
from consumer.postgres.protocol import Connection

_STATES = """
select o.number, l.applied_at, l.fingerprint = o.fingerprint, t.name, l.partition, l."offset",
       d.dead_letter, d.state, d.reason, d.died_at, a.attempts
from unnest($2::text[], $3::uuid[], $4::int8[], $5::text[], $6::int4[], $7::int8[]) with ordinality
     as o(handler, id, fingerprint, topic, partition, "offset", number)
join consumer.handlers h on h.app = $1 and h.name = o.handler
left join consumer.ledger l on l.handler = h.handler and l.id = o.id
left join consumer.topics t on t.topic = l.topic
left join consumer.dead_letters d on (d.handler, d.id, d.fingerprint) = (h.handler, o.id, o.fingerprint)
left join consumer.attempts a
     on (a.handler, a.topic, a.partition, a."offset") = (h.handler, o.topic, o.partition, o."offset")
"""


async def read(connection: Connection, app: str, deliveries: Sequence[Delivery]) -> list[StoredState]:
    """Return what is stored of identified deliveries, in their order.

    Raises what the driver raises.
    """
    records = [delivery.record for delivery in deliveries]
    rows = await connection.fetch(
        _STATES,
        app,
        [delivery.handler.name for delivery in deliveries],
        [UUID(bytes=delivery.id) for delivery in deliveries],
        [delivery.fingerprint for delivery in deliveries],
        [record.topic for record in records],
        [record.partition for record in records],
        [record.offset for record in records],
    )
    states = [NOTHING] * len(deliveries)
    for number, applied_at, same, topic, partition, offset, *rest in map(tuple, rows):
        claimed_by = None if offset is None else (Partition(topic, partition), offset)
        states[number - 1] = StoredState(applied_at, bool(same), claimed_by, *rest)
    return states
