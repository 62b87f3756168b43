"""One moment for all passes of a rebuild: a connection that keeps the snapshot in which each of them sees the real tables.

Workers go on between two passes. If each saw another state, a row that has lost an effect and was changed since would look
as if it depended on when its handler ran. Knows PostgreSQL; knows no message. Limitation: a table that is truncated or
written anew by ALTER TABLE between two passes looks empty to the second one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from consumer.postgres.connection import connect
from consumer.settings import Settings

# It is idle for as long as the rebuild runs.
_BEGIN = """
begin isolation level repeatable read read only;
select set_config(name, value, true) from (values
    ('idle_in_transaction_session_timeout', '0'), ('statement_timeout', '0'), ('transaction_timeout', '0')
) as s(name, value) where exists (select from pg_settings p where p.name = s.name)
"""


class OneSnapshot:
    """A snapshot, from `take` to `close`. name: by which another transaction imports it."""

    def __init__(self, settings: Settings) -> None:
        self.name = ""
        self._settings = settings
        self._connection: Any = None

    async def take(self) -> None:
        """See the state as of now from here on. A snapshot that was taken before is gone."""
        if self._connection is None:
            self._connection = await connect(self._settings)
        else:
            await self._connection.execute("rollback")
        await self._connection.execute(_BEGIN)
        self.name = await self._connection.fetchval("select pg_export_snapshot()")

    async def close(self) -> None:
        """Let it go, whatever has happened."""
        if self._connection is not None:
            try:
                with suppress(Exception):
                    await self._connection.close(timeout=5)
            finally:
                self._connection.terminate()
