"""Detects that a server has few connections left.

Then workers share them. Limitations: behind a pooler the number of connections means nothing, and nothing is asked.
"""

from __future__ import annotations

from consumer.postgres.protocol import Connection

FREE_MIN = 2  # with fewer, another worker may be waiting for one
SECONDS = 15.0  # for which connections are shared after the last shortage
HELD_SECONDS_MAX = 0.5  # by a lane, while they are shared

# The smallest remainder of the server, the role and the database. Rows of other roles hide their kind of backend, not
# their database; reserved_connections exists since PostgreSQL 16.
_FREE = """
select least(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0)
        - (select count(*) from pg_stat_activity where datid is not null),
    (select case when rolconnlimit >= 0 then rolconnlimit - (select count(*) from pg_stat_activity where usename = current_user) end
     from pg_roles where rolname = current_user),
    (select case when datconnlimit >= 0 then datconnlimit - (select count(*) from pg_stat_activity where datname = current_database()) end
     from pg_database where datname = current_database())
)
"""


async def is_crowded(connection: Connection) -> bool:
    """Return whether few connections are left to the server, role or database."""
    return bool(await connection.fetchval(_FREE) < FREE_MIN)
