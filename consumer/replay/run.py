"""What the parts of one replay share, and its progress.

Imports kafka, postgres, precheck and transaction.
The reader fills it, chunk by chunk; the checkpoint saves and restores it; the summary reads it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.identity import ids_of_text
from consumer.core.message import Partition, Record
from consumer.core.ordering import Scheduler
from consumer.postgres.session import Session
from consumer.precheck.client import Precheck
from consumer.replay.check import ReplayCheck
from consumer.replay.findings import Findings
from consumer.replay.options import Limits, Options, Progress, filters, key_bytes
from consumer.replay.primary import Primary
from consumer.replay.selection import choose_handlers
from consumer.settings import Settings
from consumer.transaction.result import LedgerIds


@dataclass(slots=True)
class ReplayLane:
    """Some partitions in order: their scheduler, their chunks, their connections.

    checking: its transactions are always rolled back. applying: the handlers of missing messages run there.
    """

    scheduler: Scheduler
    chunks: asyncio.Queue[tuple[Partition, Sequence[Record], int] | None]
    checking: Session | None = None
    applying: Session | None = None


@dataclass(slots=True)
class Counted:
    """Up to where the deliveries of each partition are counted.

    They may still be on their way to be applied.
    before: by the part of the replay that was interrupted.
    """

    now: dict[Partition, int] = field(default_factory=dict)
    before: dict[Partition, int] = field(default_factory=dict)


class Run:
    """The state of one replay."""

    def __init__(
        self, app: App, settings: Settings, topics: list[str], options: Options, progress: Progress, limits: Limits
    ) -> None:
        self.app, self.settings, self.topics = app, settings, topics
        self.options, self.progress, self.limits = options, progress, limits
        self.handlers = choose_handlers(app, topics, options.handlers)
        self.key = key_bytes(options.key)
        self.message_ids = None if options.message_id is None else ids_of_text(options.message_id)
        self.started_at = datetime.now(UTC)
        self.began = time.monotonic()
        self.findings = Findings(
            app.name,
            options.mode,
            self.started_at.isoformat(timespec="seconds"),
            filters(options.start, options.end, options.partitions, options.key, options.message_id, options.handlers),
        )
        self.primary = Primary(settings, self.how_far, app.connection_init)
        self.check = ReplayCheck(
            self.findings, self.applies, options.call_handlers, options.assume_unapplied, self.primary.open
        )
        self.ids = LedgerIds(app.name, {})
        self.precheck: Precheck | None = None
        self.lanes: list[ReplayLane] = []
        self.counted = Counted()
        self.resumed_at: dict[Partition, int] = {}
        self.offset_ids: set[str] = set()  # topics with messages that are identified by their offset
        self.id_rule_doubts: list[dict[str, Any]] = []
        self.conditions: dict[str, Mapping[str, str | None]] = {}  # what may not change before a resume
        self.dead_letters_before = 0  # number of the last dead letter before this replay stored anything
        self.has_read_sequences = False  # of this part, at its end
        self.lost_sequences = False  # a connection was lost before its sequences were read

    @property
    def applies(self) -> bool:
        """Whether missing messages are applied and stored."""
        return self.options.mode == "apply"

    def handlers_of(self, topic: str) -> list[Handler]:
        """Return the chosen handlers of a topic."""
        return [handler for handler in self.handlers if topic in handler.topics]

    def narrowing_options(self) -> list[str]:
        """Return the options that choose single messages."""
        chosen = {"--key": self.key, "--message-id": self.message_ids}
        return [name for name, value in chosen.items() if value is not None]

    def refuse_nothing_selected(self) -> None:
        """Raise Misconfigured when a filter let nothing through."""
        if self.message_ids is not None and not self.findings.counts:
            raise Misconfigured(
                "--message-id: no message of the range has that id, for these handlers; nothing was changed"
            )
        if self.key is not None and not self.findings.messages:
            raise Misconfigured("--key: no message of the range has that key; nothing was changed")

    # -- progress ---------------------------------------------------------------------------------------------------

    def reached(self) -> dict[Partition, int]:
        """Return the next offset of each partition."""
        reached = dict(self.resumed_at)
        for lane in self.lanes:
            reached |= {partition: lane.scheduler.position(partition) for partition in lane.scheduler.partitions}
        return reached

    def report_progress(self) -> None:
        """Report how many offsets are done."""
        self.progress.progress("replaying", *self._done())

    def how_far(self) -> str:
        """Return how far the replay has come, to end an error message."""
        done, total = self._done()
        if not total:
            return "before anything was read; nothing was changed"
        applied = self.findings.total("applied_now") + self.findings.total("dead_lettered_now")
        changed = f"{applied:,} missing messages were settled, each once" if applied else "nothing was changed"
        can_resume = self.progress.save is not None and self.reached()
        return f"after {done:,} of {total:,} offsets; {changed}{'; --resume goes on from here' if can_resume else ''}"

    def _done(self) -> tuple[int, int]:
        spans = self.findings.spans
        firsts = {span.partition: span.first for span in spans}
        done = sum(offset - firsts[partition] for partition, offset in self.reached().items() if partition in firsts)
        return done, sum(span.length for span in spans)

    # -- the end ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close all connections but the log's."""
        for lane in self.lanes:
            for session in (lane.checking, lane.applying):
                if session is not None:
                    session.close()
        if self.check.session is not None:
            self.check.session.close()
        if self.precheck is not None:
            await self.precheck.stop()
