"""The outbox's intake: what web applications publish, until a worker moves it.

Table: outbox_intake. migrations/0003_outbox_intake.sql says why there is no cursor and no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg

from consumer.core.errors import Misconfigured
from consumer.outbox.record import OutgoingRecord, headers_as_json, headers_from_json
from consumer.postgres.errors import SchemaMissing
from consumer.postgres.protocol import Connection

_ROWS_MAX = 500
_BYTES_MAX = 8 << 20

# Text and bytea only: the caller's connection may have other codecs for uuid and jsonb.
_PUT = """
insert into consumer.outbox_intake (app, id, topic, key, value, headers)
select $1, r.id::uuid, r.topic, r.key, r.value, r.headers::jsonb
from unnest($2::text[], $3::text[], $4::bytea[], $5::bytea[], $6::text[])
     with ordinality as r(id, topic, key, value, headers, number)
order by r.number
"""
_IS_WAITING = "select exists (select from consumer.outbox_intake where app = $1)"
# Rows are locked in one order, so that two workers wait for each other instead of deadlocking. The second one finds the
# rows of the first one gone.
_TAKE = """
with part as materialized (
    select place from consumer.outbox_intake
    where app = $1 and place <= (
        select max(place) from (
            select place, sum(coalesce(octet_length(value), 0) + coalesce(octet_length(key), 0)) over (order by place) as size,
                   row_number() over (order by place) as number
            from (select * from consumer.outbox_intake where app = $1 order by place limit $2) as next
        ) as sized
        where size <= $3 or number = 1)
    order by place for update
), taken as (
    delete from consumer.outbox_intake i using part where i.app = $1 and i.place = part.place
    returning i.place, i.id, i.topic, i.key, i.value, i.headers::text
)
select id, topic, key, value, headers from taken order by place
"""
_WAITING = """
select count(*), extract(epoch from min(created_at))::float8 from consumer.outbox_intake where app = $1
"""


async def put(connection: Any, app: str, records: Sequence[OutgoingRecord]) -> None:
    """Store records in the caller's open transaction, in their order.

    Raises Misconfigured where the table is missing or the role may not insert, and what the driver raises.
    """
    columns = [
        [str(UUID(bytes=record.id)) for record in records],
        [record.topic for record in records],
        [record.key for record in records],
        [record.value for record in records],
        [headers_as_json(record.headers) for record in records],
    ]
    try:
        await connection.execute(_PUT, app, *columns)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        raise SchemaMissing("publishing: the outbox is not in this database; run `consumer migrate`") from None
    except asyncpg.InsufficientPrivilegeError:
        raise Misconfigured(
            "publishing: this role may not insert into the outbox; run `consumer migrate --grants ROLE --publish-only`, "
            "and execute what it prints"
        ) from None


async def is_waiting(connection: Connection, app: str) -> bool:
    """Whether rows of an App wait to be moved."""
    return bool(await connection.fetchval(_IS_WAITING, app))


async def take(connection: Connection, app: str) -> list[OutgoingRecord]:
    """Remove the first rows in the open transaction, and return them.

    At most 500, and about 8 MiB unless one is larger.
    """
    rows = await connection.fetch(_TAKE, app, _ROWS_MAX, _BYTES_MAX)
    return [
        OutgoingRecord(topic, id.bytes, key, value, headers_from_json(headers))
        for id, topic, key, value, headers in map(tuple, rows)
    ]


async def waiting(connection: Connection, app: str) -> tuple[int, float | None]:
    """Return how many rows wait, and since when. In Unix seconds."""
    count, since = tuple(await connection.fetchrow(_WAITING, app))
    return count, since
