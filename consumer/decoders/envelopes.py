"""Values that wrap a payload: CloudEvents, and changes of Debezium.

A decoder builds them with contents of no type yet; `with_contents` converts these to the type that a handler declares.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import msgspec

from consumer.core.models import Unfit
from consumer.core.record_decoding import Envelope

T = TypeVar("T")


class CloudEvent(Envelope, Generic[T], frozen=True, kw_only=True):
    """A CloudEvent of version 1.0, in binary or structured mode.

    `data` is decoded to T; None for an event without data. `time` is as the producer wrote it, with its offset.
    `extensions` holds the attributes that the specification does not name: text in binary mode, values of JSON in
    structured mode.
    """

    decoded_by: ClassVar[str] = "CloudEvents()"

    id: str
    source: str
    type: str
    data: T
    subject: str | None = None
    time: datetime | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    extensions: dict[str, Any] = msgspec.field(default_factory=dict)

    def with_contents(self, convert: Callable[[object], Any]) -> Self:
        """Return the event with its data converted. Raises what convert raises."""
        return msgspec.structs.replace(self, data=convert(self.data))


class Change(Envelope, Generic[T], frozen=True, kw_only=True):
    """A change of a row, as Debezium sends it.

    `op`: c (insert), u (update), d (delete), r (read by a snapshot) or t (truncate). `before` is None for c and r, and
    where the database does not log it; `after` is None for d and t. `source` says where the change was: its keys depend on
    the connector. `ts_ms`: when the connector handled it, in milliseconds since 1970 UTC.

    `id` is the same when the connector sends the change again, for PostgreSQL, MySQL and MariaDB; None for others. It is
    derived from the connector, the table, the place in the database's log, the operation and the rows as they were sent. A
    caller may not assume that two snapshots give a row the same id, nor that equal rows of a table without a primary key
    have different ones, where they were inserted together.
    """

    decoded_by: ClassVar[str] = "Debezium()"

    id: bytes | None = None
    op: Literal["c", "u", "d", "r", "t"]
    before: T | None
    after: T | None
    source: dict[str, Any]
    ts_ms: int | None = None
    transaction: dict[str, Any] | None = None

    def with_contents(self, convert: Callable[[object], Any]) -> Self:
        """Return the change with its rows converted.

        Raises Unfit, and what convert raises.
        """
        before = None
        if self.before is not None:
            try:
                before = convert(self.before)
            except Exception as error:
                raise Unfit(
                    f"before: {error if isinstance(error, Unfit) else type(error).__name__}; if columns are missing in "
                    "it, set REPLICA IDENTITY FULL of the table, or declare them optional"
                ) from error
        after = None if self.after is None else convert(self.after)
        return msgspec.structs.replace(self, before=before, after=after)
