"""Dead letters as commands print them.

Reads, and records who looked at a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from consumer.admin.bytes_as_text import text_or_base64
from consumer.core.dead_letter_seal import altered, is_erased
from consumer.postgres import dead_letter_actions, dead_letter_queries
from consumer.postgres.dead_letter_actions import Action
from consumer.postgres.dead_letter_queries import Matching, OpenMatching
from consumer.postgres.dead_letters import storable
from consumer.postgres.protocol import Connection

_ACTIONS_MAX = 1000  # of one dead letter


async def dead_letters(connection: Connection, *filters: Any, **more: Any) -> list[dict[str, Any]]:
    """List the newest dead letters, without their bytes.

    The filters are those of `Matching`.
    """
    rows = await dead_letter_queries.newest(connection, Matching(*filters, **more))
    return [{**dict(row), "id": row["id"].hex, "died_at": row["died_at"].isoformat()} for row in rows]


async def error_groups(connection: Connection, *filters: Any, **more: Any) -> list[dict[str, Any]]:
    """Count dead letters by kind of error, the most frequent kind first.

    Each group names its first dead letter.
    """
    return [dict(row) for row in await dead_letter_queries.groups(connection, Matching(*filters, **more))]


async def actions(connection: Connection, *filters: Any, **more: Any) -> list[dict[str, Any]]:
    """List what people did to dead letters, the newest first."""
    return [_action(row) for row in await dead_letter_queries.actions_on(connection, Matching(*filters, **more))]


async def dead_letter(connection: Connection, number: int) -> dict[str, Any] | None:
    """Return one dead letter with its bytes and actions.

    Bytes are text if they are UTF-8, else {"base64": …}. None: no dead letter has that number.
    """
    row = await dead_letter_queries.one(connection, number)
    if row is None:
        return None
    return {
        "letter": row["dead_letter"],
        "app": row["app"],
        "handler": row["handler_name"],
        "id": row["id"].hex,
        "topic": row["topic"],
        "partition": row["partition"],
        "offset": row["offset"],
        "timestamp": row["timestamp"],
        "state": row["state"],
        "reason": row["reason"],
        "kind": row["kind"],
        "group": row["error_group"],
        "error": row["error"],
        "trace": row["trace"].splitlines(),
        "attempts": row["attempts"],
        "died_at": row["died_at"].isoformat(),
        "waits_behind": row["first"],
        "waiting_behind_it": row["behind"],
        "key": text_or_base64(row["key"]),
        "headers": [
            [text_or_base64(name), text_or_base64(value)]
            for name, value in zip(row["header_keys"], row["header_values"], strict=True)
        ],
        "value": text_or_base64(row["value"]),
        "altered": altered(row),
        "erased": is_erased(row),
        "actions": [_action(action) for action in await dead_letter_queries.actions(connection, number, _ACTIONS_MAX)],
    }


async def waiting_behind(connection: Connection, number: int, limit: int) -> list[dict[str, Any]]:
    """List the dead letters that wait behind one, in their order."""
    rows = await dead_letter_queries.behind(connection, number, limit)
    return [{**dict(row), "died_at": row["died_at"].isoformat()} for row in rows]


class OpenCounts(NamedTuple):
    """How many open dead letters a selection has.

    unsure: those among them that may have been applied already.
    """

    open: int
    unsure: int


async def count_open(
    connection: Connection, app: str, numbers: Sequence[int] | None, group: str | None = None
) -> OpenCounts:
    """Count open dead letters: those with these numbers, or of a group."""
    matching = OpenMatching(app, numbers, None, None, None, group, None, None)
    selected = await dead_letter_queries.select(connection, matching, waiting=True, too_old=True)
    return OpenCounts(len(selected), await dead_letter_queries.count_unsure(connection, matching))


async def record_view(connection: Connection, app: str, number: int, operator: str) -> bool:
    """Record that an operator looks at the message of a dead letter.

    Returns False, and records nothing, where the App has no such dead letter.
    """
    standing = (await dead_letter_queries.standings(connection, [number])).get(number)
    if standing is None or standing.app != app:
        return False
    action = Action(number, storable(operator), "dlq view", "shown", "", "", None, None)
    await dead_letter_actions.record(connection, [action])
    return True


def _action(row: Any) -> dict[str, Any]:
    return {
        **dict(row),
        "at": row["at"].isoformat(),
        "new_id": row["new_id"].hex if row["new_id"] is not None else None,
        "new_value": text_or_base64(row["new_value"]),
    }
