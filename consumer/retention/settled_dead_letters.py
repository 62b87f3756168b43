"""Erases the messages of dead letters that were settled long ago.

The rows stay, since the ledger, replays and the order of retries refer to them. Limitations: several workers may do it at
once, which erases each once. A dead letter that was settled before actions were recorded counts from when it was stored.
"""

from __future__ import annotations

from consumer.core.audit import ActedBy
from consumer.core.retention import HOUR
from consumer.postgres import dead_letter_actions, dead_letter_queries
from consumer.postgres.protocol import Connection

_AT_A_TIME = 500


async def erase(connection: Connection, app: str, hours: float) -> int:
    """Erase what was settled `hours` ago; return how many dead letters."""
    by = ActedBy("consumer run", f"settled more than {hours:g} hours ago (CONSUMER_DEAD_LETTER_RETENTION_HOURS)")
    erased = 0
    while numbers := await dead_letter_queries.settled_before(connection, app, hours * HOUR, _AT_A_TIME):
        erased += await dead_letter_actions.erase(connection, numbers, by)
    return erased
