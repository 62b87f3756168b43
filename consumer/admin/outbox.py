"""The outbox as commands print it, and actions on its streams."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from consumer.core.audit import ActedBy
from consumer.core.errors import Misconfigured
from consumer.postgres import outbox, outbox_intake
from consumer.postgres.connection import translated_errors
from consumer.postgres.outbox import StreamOverview
from consumer.postgres.protocol import Connection
from consumer.settings import Settings

_ACTIONS_MAX = 100


@dataclass(frozen=True, slots=True)
class Resumed:
    """What an action did to a stream.

    from_seq: the first row that was not published. to_seq: the row at which it goes on. None: it is not stopped.
    """

    stream: int
    from_seq: int | None
    to_seq: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the action as `--json` prints it."""
        discarded = None if self.from_seq is None or self.to_seq is None else self.to_seq - self.from_seq
        return {"stream": self.stream, "resumed": self.from_seq is not None, "discarded": discarded}


async def summary(connection: Connection, app: str) -> dict[str, Any]:
    """Return what `consumer status` reports of the outbox."""
    streams = await outbox.overview(connection, app)
    intake, since = await outbox_intake.waiting(connection, app)
    oldest = [seconds for seconds in (since, *(stream.oldest for stream in streams)) if seconds is not None]
    return {
        "unpublished": intake + sum(stream.unpublished for stream in streams),
        "intake": intake,
        "oldest": time_text(min(oldest, default=None)),
        "stopped": [stream_as_dict(stream) for stream in streams if stream.state.stopped is not None],
    }


def stream_as_dict(stream: StreamOverview) -> dict[str, Any]:
    """Return a stream as `--json` prints it."""
    state = stream.state
    return {
        "stream": state.stream,
        "source_topic": state.source.topic,
        "source_partition": state.source.partition,
        "topic": state.topic,
        "published": state.watermark,
        "unpublished": stream.unpublished,
        "oldest": time_text(stream.oldest),
        "stopped": state.stopped,
        "stopped_at": time_text(stream.stopped_at),
    }


def time_text(seconds: float | None) -> str | None:
    """Return a time as text; None for none."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


async def read_stream(connection: Connection, app: str, number: int, limit: int) -> dict[str, Any]:
    """Read one stream with its next rows and the actions on it.

    Without the bytes of rows. Raises Misconfigured for a stream that the App does not have.
    """
    for stream in await outbox.overview(connection, app):
        if stream.state.stream == number:
            break
    else:
        raise Misconfigured(f"stream {number}: not of this App; see `consumer outbox list APP`")
    rows = await outbox.details(connection, number, stream.state.watermark, limit)
    actions = await outbox.actions(connection, number, _ACTIONS_MAX)
    return stream_as_dict(stream) | {
        "rows": [row._asdict() | {"id": str(row.id), "created_at": time_text(row.created_at)} for row in rows],
        "actions": [action._asdict() | {"at": time_text(action.at)} for action in actions],
    }


async def resume(
    settings: Settings, connection: Connection, app: str, stream: int, discard: int, by: ActedBy
) -> Resumed:
    """Let a stopped stream go on; a worker notices within a second.

    discard: how many of its next rows are not published. Raises Misconfigured, Outage.
    """
    with translated_errors(settings):
        moved = await outbox.resume(connection, app, stream, discard, by)
    return Resumed(stream, None, None) if moved is None else Resumed(stream, *moved)
