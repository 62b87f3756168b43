"""Records as the log has them, and messages as handlers see them.

Knows the fields of a Kafka record, not the client that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from consumer.core.errors import TransactionMisuse
from consumer.core.idempotency import idempotency_key

T = TypeVar("T")


class Partition(NamedTuple):
    """A partition of a topic; equal to the clients' own tuples."""

    topic: str
    partition: int


class RecordContent(Protocol):
    """What a producer sends. timestamp: milliseconds since 1970."""

    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


class Record(RecordContent, Protocol):
    """A record, of any reader."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...


class Message(msgspec.Struct, Generic[T], frozen=True):
    """A message and where it came from.

    Ask for it by annotating a parameter ``Message[T]``.

    `value` is decoded to T. `headers` keeps order and repeated names. `timestamp` is the record's, in milliseconds
    since 1970 UTC, set by the producer or the broker; it need not grow with the offset.
    `id` is the 16-byte identity as hexadecimal text, the same for every delivery of the message.
    `dry_run` is true while a replay calls the handler in a transaction that is rolled back: skip effects elsewhere.
    `app` and `handler` are the names of the App and of the handler that is called.
    """

    id: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp: int
    value: T
    dry_run: bool = False
    app: str = ""
    handler: str = ""

    def idempotency_key(self, step: str) -> str:
        """Return a key to send with a request to another system.

        32 hexadecimal digits, the same whenever and wherever this message runs: again after a failure or a crash, in
        another worker, in a replay, in an operator's retry. Another App, handler, message or step has another key.

        - step: names the request, such as "charge", where one message causes several.

        A caller may not assume that the other system still knows the key: most forget it after some time, and then make
        a request with it a second one. See docs/how-to/calling-other-systems.md. Raises TransactionMisuse for a step
        that is no text or empty.
        """
        if not isinstance(step, str) or not step:
            raise TransactionMisuse(
                'idempotency_key: the step has no name; name the step, for example message.idempotency_key("charge")'
            )
        return idempotency_key(self.app, self.handler, bytes.fromhex(self.id), step)


def as_dry_run(argument: Any) -> Any:
    """Return a handler's argument with `dry_run` set in its messages."""
    if isinstance(argument, list):
        return [as_dry_run(message) for message in argument]
    return msgspec.structs.replace(argument, dry_run=True) if isinstance(argument, Message) else argument


class LogRecord(msgspec.Struct, frozen=True, gc=False):
    """A record as it was read.

    It is light, since there is one for each message: half of the client's own. The garbage collector does not track it,
    since it has no reference that could lead back to it.

    `fault` says what is wrong with a record that the client could not read. Its bytes are kept, for a dead letter: the
    keys of its `headers` are decoded with surrogateescape; encode them in the same way for the raw bytes.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    fault: str = ""
