"""Asks a PostgreSQL server which history of its database it serves.

SQL only; knows no driver.

Every transaction compares a stamp (timeline, start time, nonce) with that of its connection's start, because a pooler
keeps client connections while the server behind them changes. Managed services refuse some of these functions (Amazon
Aurora: `pg_current_wal_lsn()`); then the epoch consists of the other parts. The start time alone distinguishes two
histories; without it nothing that depends on the epoch (the pre-check) can be used.
"""

from __future__ import annotations

from typing import NamedTuple

from consumer.postgres.epoch import UNKNOWN
from consumer.postgres.protocol import Connection

_PARTS = {
    "system": "(select pg_catalog.to_hex(system_identifier) from pg_catalog.pg_control_system())",
    "timeline": "case when not pg_catalog.pg_is_in_recovery() then "
    "pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end",
    "started": "pg_catalog.to_hex((extract(epoch from pg_catalog.pg_postmaster_start_time()) * 1000000)::int8)",
}
_STAMPED = ("timeline", "started")  # not system: it would read the control file for every batch, and adds nothing
_NONCE = "(select nonce::text from consumer.installation)"
_AWAY = ("08", "53", "57")  # SQLSTATE classes: lost connection, no resources, shutdown
_STATE = "select pg_catalog.pg_is_in_recovery(), pg_catalog.to_regclass('consumer.schema_versions') is not null"


class ServerIdentity(NamedTuple):
    """Which server, and which history, a connection leads to.

    stamp: what `stamp_sql` answered; another answer is another epoch.
    """

    epoch: str
    stamp_sql: str
    stamp: str
    refused: tuple[str, ...] = ()  # parts that the server refuses to read

    @property
    def tells_history(self) -> bool:
        """Whether another history shows as another epoch."""
        return "started" not in self.refused


async def state(connection: Connection) -> tuple[bool, bool]:
    """Return whether the server is a standby, and whether the schema exists."""
    standby, migrated = await connection.fetchrow(_STATE)
    return standby, migrated


async def schema_version(connection: Connection) -> int:
    """Return the version of the existing schema; 0 without a recorded migration."""
    return await connection.fetchval("select max(version) from consumer.schema_versions") or 0


async def installed_at(connection: Connection) -> str:
    """Return when the schema was created, in microseconds, as text.

    Another value is another schema, to whatever time the database is restored.
    """
    return str(
        await connection.fetchval(
            "select (extract(epoch from made_at) * 1000000)::bigint::text from consumer.installation"
        )
    )


async def begin_epoch(connection: Connection) -> None:
    """Begin a new epoch.

    Connections and Redis's marks of the one before no longer count.
    """
    await connection.execute("update consumer.installation set nonce = gen_random_uuid()")


async def identify(connection: Connection) -> ServerIdentity:
    """Read the epoch of a primary with the schema, outside a transaction.

    Raises what the driver raises.
    """
    try:
        return await _read(connection, ())
    except Exception as error:
        if not _is_refusal(connection, error):
            raise
    refused = []
    for name, expression in _PARTS.items():
        try:
            await connection.fetchval(f"select {expression}")
        except Exception as error:
            if not _is_refusal(connection, error):
                raise
            refused.append(name)
    return await _read(connection, tuple(refused))


async def _read(connection: Connection, refused: tuple[str, ...]) -> ServerIdentity:
    parts = {name: f"'{UNKNOWN}'" if name in refused else sql for name, sql in _PARTS.items()}
    stamp_sql = f"concat_ws('-', {', '.join(parts[name] for name in _STAMPED)}, {_NONCE})"
    row = await connection.fetchrow(f"select {', '.join(parts.values())}, {_NONCE}, {stamp_sql}")
    system, timeline, started, nonce, stamp = row
    epoch = f"{system}-{timeline}-{nonce.replace('-', '')[:12]}-{started}"
    return ServerIdentity(epoch, stamp_sql, stamp, refused)


def _is_refusal(connection: Connection, error: Exception) -> bool:
    """Return whether the server answered with a refusal, instead of being away."""
    sqlstate = getattr(error, "sqlstate", None)
    return sqlstate is not None and sqlstate[:2] not in _AWAY and not connection.is_closed()
