"""Keeps one snapshot of the real tables for all passes.

Workers write between two passes. If each pass saw another state, a row that lost an effect and was changed since would look
as if it depended on when its handler ran. Limitation: a table that is truncated, or rewritten by ALTER TABLE, between two
passes looks empty to the second one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from consumer.postgres.connection import connect
from consumer.settings import Settings

# The connection is idle while the rebuild runs.
_BEGIN = """
begin isolation level repeatable read read only;
select set_config(name, value, true) from (values
    ('idle_in_transaction_session_timeout', '0'), ('statement_timeout', '0'), ('transaction_timeout', '0')
) as s(name, value) where exists (select from pg_settings p where p.name = s.name)
"""


class SharedSnapshot:
    """A snapshot that other transactions import, from `take` to `close`.

    name: what they import it by.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = ""
        self._settings = settings
        self._connection: Any = None

    async def take(self) -> None:
        """Take a snapshot of the current state; drop the one before."""
        if self._connection is None:
            self._connection = await connect(self._settings)
        else:
            await self._connection.execute("rollback")
        await self._connection.execute(_BEGIN)
        self.name = await self._connection.fetchval("select pg_export_snapshot()")

    async def close(self) -> None:
        """Drop the snapshot and its connection; raises nothing."""
        if self._connection is not None:
            try:
                with suppress(Exception):
                    await self._connection.close(timeout=5)
            finally:
                self._connection.terminate()
