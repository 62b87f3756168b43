"""Find what became of one message."""

from __future__ import annotations

from typing import Any

from consumer.core.identity import event_id, ids_of_text, reads_like_offset
from consumer.postgres import effects, ledger_queries, positions
from consumer.postgres.protocol import Connection

_DEAD_LETTER_STATES = {"waiting": "waiting", "discarded": "discarded"}


async def find_message(
    connection: Connection, app: str, text: str | bytes, source: str | None = None
) -> dict[str, Any]:
    """Return what each handler of an App did with a message id.

    Also which calls it made. source: the source of the CloudEvent with that id.
    """
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    if source is not None:
        keys: tuple[bytes, ...] = (event_id(source.encode("utf-8", "surrogateescape"), raw),)
    elif reads_like_offset(raw):
        topic, partition, _ = raw.decode("ascii", "replace").split(":", 2)
        keys = ids_of_text(raw, await positions.salts(connection, topic, partition))
    else:
        keys = ids_of_text(raw)
    rows = [row for row in await ledger_queries.show(connection, keys) if row["app"] == app]
    calls = await effects.calls(connection, app, keys)
    known = [*rows, *calls]
    return {
        "key": (known[0]["id"].bytes if known else keys[0]).hex(),
        "handlers": [_handler(row) for row in rows],
        "effects": [_call(row) for row in calls],
    }


def _handler(row: Any) -> dict[str, Any]:
    is_applied = row["applied_at"] is not None
    at = row["applied_at"] or row["died_at"]
    return {
        "app": row["app"],
        "handler": row["handler"],
        "state": "applied" if is_applied else _DEAD_LETTER_STATES.get(row["letter"], "dead-lettered"),
        "at": at.isoformat() if at else None,
        "topic": row["topic"],
        "partition": row["partition"],
        "offset": row["offset"],
        "letter": row["dead_letter"],
        "reason": row["reason"],
    }


def _call(row: Any) -> dict[str, Any]:
    return {
        "handler": row["handler"],
        "key": row["key"],
        "calls": row["attempts"],
        "first_call_at": row["first_at"].isoformat(),
        "result_at": row["result_at"].isoformat() if row["result_at"] else None,
    }
