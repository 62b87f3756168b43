"""Dead letters as commands print them. Reads only."""

from __future__ import annotations

import base64
from typing import Any

from consumer.core.dead_letter_seal import altered, is_erased
from consumer.postgres import dead_letter_queries
from consumer.postgres.dead_letter_queries import Matching
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
        "key": _text_or_base64(row["key"]),
        "headers": [
            [_text_or_base64(name), _text_or_base64(value)]
            for name, value in zip(row["header_keys"], row["header_values"], strict=True)
        ],
        "value": _text_or_base64(row["value"]),
        "altered": altered(row),
        "erased": is_erased(row),
        "actions": [_action(action) for action in await dead_letter_queries.actions(connection, number, _ACTIONS_MAX)],
    }


def _action(row: Any) -> dict[str, Any]:
    return {
        **dict(row),
        "at": row["at"].isoformat(),
        "new_id": row["new_id"].hex if row["new_id"] is not None else None,
        "new_value": _text_or_base64(row["new_value"]),
    }


def _text_or_base64(raw: bytes | None) -> str | dict[str, str] | None:
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}
