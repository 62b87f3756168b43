"""The copy of a dead letter for the dead-letter topic. Pure.

It has the original's key, value and headers, and besides: `dead-letter-id` (app/handler/number), `dead-letter-app`,
`-handler`, `-topic`, `-partition`, `-offset`, `-timestamp`, `-reason`, `-error` (the exception's class or SQLSTATE, not its
text, which may quote the payload) and `-attempts`. The header `message-id` is the copy's own; the original's is
`dead-letter-message-id`. Headers whose names are not UTF-8 are left out, and `dead-letter-altered` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from consumer.core.message import Partition
from consumer.outbox.record import MESSAGE_ID, Outgoing, OutgoingRecord, stable_id


class StoredDeadLetter(NamedTuple):
    """A dead letter as PostgreSQL has it.

    number: of the dead letter. handler: number. id: 16 bytes. timestamp: of its record, in milliseconds since 1970. kind: the
    exception's class or SQLSTATE.
    """

    number: int
    app: str
    handler: int
    handler_name: str
    id: bytes
    fingerprint: int
    topic: str
    partition: int
    offset: int
    timestamp: int
    reason: str
    kind: str
    attempts: int
    key: bytes | None
    value: bytes | None
    header_names: Sequence[bytes]
    header_values: Sequence[bytes | None]


def copy_of(letter: StoredDeadLetter, topic: str) -> Outgoing:
    """Return the record that the dead-letter topic gets.

    Its id is the same whenever this App's handler gives up this message.
    """
    kept: list[tuple[str, bytes | None]] = []
    is_altered = False
    for raw, value in zip(letter.header_names, letter.header_values, strict=True):
        name = _name(raw)
        if name is None:
            is_altered = True
        else:
            kept.append((name, value))
    fields: dict[str, object] = {
        "id": f"{letter.app}/{letter.handler_name}/{letter.number}",
        "app": letter.app,
        "handler": letter.handler_name,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp": letter.timestamp,
        "reason": letter.reason,
        "error": letter.kind,
        "attempts": letter.attempts,
    }
    if is_altered:
        fields["altered"] = "a header whose name is not UTF-8 was left out"
    headers = (*kept, *((f"dead-letter-{name}", str(value).encode()) for name, value in fields.items()))
    id = stable_id(
        b"dead-letter", letter.app.encode(), letter.handler_name.encode(), letter.id, b"%d" % letter.fingerprint
    )
    record = OutgoingRecord(topic, id, letter.key, letter.value, headers)
    return Outgoing(record, Partition(letter.topic, letter.partition), letter.handler, letter.offset)


def _name(raw: bytes) -> str | None:
    """Return the name of a header; None: it cannot be sent."""
    if b"\0" in raw:  # which jsonb does not hold
        return None
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return f"dead-letter-{MESSAGE_ID}" if name.lower() == MESSAGE_ID else name
