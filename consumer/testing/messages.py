"""What a test sends, and what it learns.

Messages, their outcomes, and statements that were run elsewhere.

Knows the shape of a Kafka record; knows no database and no pytest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias
from uuid import UUID

from consumer.app import App
from consumer.core.encode import to_json
from consumer.core.errors import Misconfigured
from consumer.core.message import LogRecord, Message, Partition, Record

STEPS = ("begun", "claimed", "handled", "before_commit", "committed")
"""The steps of a transaction at which `crash_at=` may crash it. Only the last one follows the COMMIT."""

EFFECT_STEPS = ("intended", "called", "remembered")
"""The steps before the transaction of an effect's messages: the intent is stored, the call made, its result stored."""

SHOWN_MAX = 20  # of one kind, in the text of an error

Text: TypeAlias = str | bytes | int | UUID


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A message as a producer sends it.

    Give the same one twice to send it twice.

    value: bytes and None as they are; anything else becomes JSON, also a Struct, a dataclass, a pydantic model, a UUID.
    id: the `message-id` header. key: a key, without which a message is ordered with no other. headers: further ones, a
    mapping, or pairs where a name comes more than once. partition: it is not derived from the key. timestamp:
    milliseconds since 1970 UTC; the time of sending by default.
    """

    topic: str
    value: Any
    _: KW_ONLY
    id: Text | None = None
    key: Text | None = None
    headers: Mapping[str, Text | None] | Sequence[tuple[str, Text | None]] = ()
    partition: int = 0
    timestamp: int | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of one message at one handler.

    outcome: "applied", "duplicate", "dead-lettered", "skipped" (the handler opted out), "waiting" (for another attempt,
    or behind a message of its key that does), "crashed" (it was in the transaction that the crash met), or
    "not delivered" (the crash came before). cause: why it is a duplicate ("batch", "ledger", "dead_letter") or a dead
    letter ("rejected", "failed", "unreadable" …). attempts: runs of the handler that failed. exception: what the last of
    them raised.
    """

    handler: str
    message: Sent
    offset: int
    outcome: str
    cause: str = ""
    error: str = ""
    attempts: int = 0
    exception: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        cause = f" ({self.cause})" if self.cause else ""
        error = f": {self.error}" if self.error else ""
        return f"{self.handler} on {name_of(self.message, self.offset)}: {self.outcome}{cause}{error}"


@dataclass(frozen=True, slots=True)
class Outside:
    """A statement that a handler ran outside its transaction.

    message: topic:partition@offset.
    """

    handler: str
    message: str
    connection: str
    statement: str

    def __str__(self) -> str:
        statement = " ".join(self.statement.split())
        shown = statement if len(statement) <= 200 else statement[:200] + " …"
        return f"{self.handler}{f' on {self.message}' if self.message else ''}, through {self.connection}: {shown}"


def place_of(record: Record | Message[Any]) -> str:
    """Return the place of a message as text."""
    return f"{record.topic}:{record.partition}@{record.offset}"


def name_of(message: Sent, offset: int) -> str:
    """Return the place and the id of a message as text."""
    shown = f" (id {_shown(message.id)})" if message.id is not None else ""
    return f"{message.topic}:{message.partition}@{offset}{shown}"


def _shown(text: Text) -> str:
    return text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else str(text)


def lines(entries: Sequence[object]) -> str:
    """Return up to SHOWN_MAX lines of an error's text."""
    more = [f"  … and {len(entries) - SHOWN_MAX} more"] if len(entries) > SHOWN_MAX else []
    return "\n".join([*(f"  {entry}" for entry in entries[:SHOWN_MAX]), *more])


def partition_of(message: Sent, app: App) -> Partition:
    """Return the partition to send a message to.

    Raises Misconfigured for a topic that no handler takes, and for a wrong partition.
    """
    if not isinstance(message.topic, str) or not app.takes(message.topic):
        raise Misconfigured(
            f"{app.name!r}: no handler of topic {message.topic!r}; {app.selection.suggestion(str(message.topic))}"
        )
    number = message.partition
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        raise Misconfigured(f"partition={number!r}: not a number; give one from 0")
    return Partition(message.topic, number)


def record_of(message: Sent, offset: int) -> LogRecord:
    """Encode a message as a producer does.

    Raises Misconfigured for what cannot become bytes.
    """
    headers = message.headers.items() if isinstance(message.headers, Mapping) else message.headers
    given = [] if message.id is None else [("message-id", _bytes(message.id, "id"))]
    return LogRecord(
        topic=message.topic,
        partition=message.partition,
        offset=offset,
        timestamp=int(time.time() * 1000) if message.timestamp is None else message.timestamp,
        key=_bytes(message.key, "key"),
        value=_json(message),
        headers=(*given, *((name, _bytes(value, f"header {name!r}")) for name, value in headers)),
        fault="",
    )


def _bytes(given: Text | None, what: str) -> bytes | None:
    if given is None or isinstance(given, bytes):
        return given
    if isinstance(given, bool) or not isinstance(given, str | int | UUID):
        raise Misconfigured(f"{what}: a {type(given).__name__}; use text, bytes, int or UUID")
    return str(given).encode("utf-8", "surrogatepass")


def _json(message: Sent) -> bytes | None:
    if message.value is None or isinstance(message.value, bytes):
        return message.value
    try:
        return to_json(message.value)
    except Exception as error:
        raise Misconfigured(f"a value for {message.topic!r}: it cannot become JSON ({error}); give bytes") from None
