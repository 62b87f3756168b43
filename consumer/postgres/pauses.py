"""What operators have paused.

Table: pauses. Limitations: a worker reads it every few seconds, so it obeys a moment later.
"""

from __future__ import annotations

from consumer.core.audit import ActedBy, Entry
from consumer.core.pauses import PauseOrder
from consumer.postgres import audit
from consumer.postgres.dead_letters import storable
from consumer.postgres.protocol import Connection

# Empty text and -1 stand for all, so that they can be in the primary key.
_READ = """
select nullif(topic, ''), nullif(partition, -1), operator, why, extract(epoch from since)::float8 from consumer.pauses
where app = $1 order by topic, partition
"""
_ADD = """
insert into consumer.pauses (app, topic, partition, operator, why) values ($1, coalesce($2, ''), coalesce($3, -1), $4, $5)
on conflict do nothing returning true
"""
_REMOVE = """
delete from consumer.pauses where app = $1 and ($2::text is null or topic = $2) and ($3::int4 is null or partition = $3)
returning nullif(topic, ''), nullif(partition, -1), operator, why, extract(epoch from since)::float8
"""


async def read(connection: Connection, app: str) -> list[PauseOrder]:
    """Return all pauses of an application."""
    return [PauseOrder(*row) for row in await connection.fetch(_READ, app)]


async def pause(connection: Connection, app: str, topic: str | None, partition: int | None, by: ActedBy) -> bool:
    """Pause a target, and record it; False if it is paused already."""
    async with connection.transaction():
        is_new = await connection.fetchval(_ADD, app, topic, partition, storable(by.operator), storable(by.why))
        if is_new:
            await audit.record(connection, Entry("pause", by, "paused", app, topic, partition))
    return bool(is_new)


async def resume(
    connection: Connection, app: str, topic: str | None, partition: int | None, by: ActedBy
) -> tuple[list[PauseOrder], list[PauseOrder]]:
    """End the pauses within a target, and record each.

    Returns the ended ones, and those that still cover some of the target.
    """
    async with connection.transaction():
        ended = [PauseOrder(*row) for row in await connection.fetch(_REMOVE, app, topic, partition)]
        await audit.record(connection, *(Entry("resume", by, "resumed", app, it.topic, it.partition) for it in ended))
        left = await read(connection, app)
    return ended, [it for it in left if it.topic in (None, topic) and it.partition in (None, partition)]
