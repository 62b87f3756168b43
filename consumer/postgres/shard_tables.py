"""What a database remembers of an application over several databases.

Tables: shards, route_probes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from consumer.postgres.protocol import Connection

_ENROLL = "insert into consumer.shards (app, shard, shards) values ($1, $2, $3) on conflict do nothing"
_ENROLLED = "select shard, shards from consumer.shards where app = $1"
_PROBES = "select keyed, key, shard from consumer.route_probes where app = $1"
_OTHER_PROBES = _PROBES + " and keyed and key = any($2::bytea[]) and shard <> $3"
_RECORD = """
insert into consumer.route_probes (app, keyed, key, shard)
select $1, k.key is not null, coalesce(k.key, ''), $3 from unnest($2::bytea[]) as k(key) on conflict do nothing
"""


class Enrolled(NamedTuple):
    """Which shard a database is, and the names of all."""

    shard: str
    shards: list[str]


class Probe(NamedTuple):
    """Where the route has sent a key; None: messages without one."""

    key: bytes | None
    shard: str


async def enroll(connection: Connection, app: str, shard: str, shards: Sequence[str]) -> None:
    """Record which shard this database is, unless one is recorded."""
    await connection.execute(_ENROLL, app, shard, shards)


async def enrolled(connection: Connection, app: str) -> Enrolled | None:
    """Return which shard this database is; None: none is recorded."""
    row = await connection.fetchrow(_ENROLLED, app)
    return None if row is None else Enrolled(*row)


async def has_probes(connection: Connection, app: str) -> bool:
    """Return whether any key is recorded."""
    return bool(await connection.fetchval("select exists (select from consumer.route_probes where app = $1)", app))


async def record_probes(connection: Connection, app: str, keys: Iterable[bytes | None], shard: str) -> None:
    """Record that the route has sent keys to a shard."""
    await connection.execute(_RECORD, app, list(keys), shard)


async def probes(connection: Connection, app: str) -> list[Probe]:
    """Return all recorded keys."""
    return [_probe(row) for row in await connection.fetch(_PROBES, app)]


async def contradicting_probes(
    connection: Connection, app: str, keys: Sequence[bytes | None], shard: str
) -> list[Probe]:
    """Return which of the keys are recorded for another shard."""
    return [_probe(row) for row in await connection.fetch(_OTHER_PROBES, app, keys, shard)]


async def forget(connection: Connection, app: str) -> None:
    """Delete what is recorded of an application's shards."""
    await connection.execute("delete from consumer.route_probes where app = $1", app)
    await connection.execute("delete from consumer.shards where app = $1", app)


def _probe(row: Any) -> Probe:
    keyed, key, shard = row
    return Probe(key if keyed else None, shard)
