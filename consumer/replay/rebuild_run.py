"""Rebuilds the state of topics, and reports it as findings.

`consumer rebuild` runs it. Imports rebuild, kafka and postgres. Handlers run on empty copies of their tables in
transactions that are rolled back (rebuild/rebuild.py). They may not connect anywhere, unless `allow_outside` is set.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from consumer.app import App
from consumer.core.message import Partition
from consumer.kafka.admin import is_compacted
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions
from consumer.rebuild.rebuild import rebuild
from consumer.rebuild.result import RebuildResult
from consumer.rebuild.state import OutgoingSink
from consumer.replay.dry_handlers import with_dry_handlers
from consumer.replay.findings import Findings
from consumer.replay.ledger_view import read_coverage, read_view
from consumer.replay.options import Progress, filters
from consumer.replay.primary import Primary, failures_as_cannot_tell, refuse_other_logs
from consumer.replay.selection import choose_handlers, refuse_shards
from consumer.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildOptions:
    """How to rebuild.

    Empty handlers mean all. ignore, compare: columns. base: SQL for the first rows.
    """

    handlers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()
    base: str | None = None
    trace: bool = True
    allow_outside: bool = False


async def run_rebuild(
    app: App,
    settings: Settings,
    topics: Sequence[str],
    options: RebuildOptions,
    progress: Progress,
    source: KafkaConsumer | None = None,
    *,
    alone: bool = False,
) -> Findings:
    """Rebuild tables from these topics, and compare the real ones.

    source: reads the log; by default a consumer without a group. alone: the process does nothing else
    (dry_run_guard.py).

    Raises Misconfigured for what cannot be rebuilt, CannotTell when it ended early. It changes nothing.
    """
    refuse_shards(app)
    work = RebuildRun(app, settings, list(dict.fromkeys(topics)), options, progress, source)
    return await with_dry_handlers(app, work.run, allow_outside=options.allow_outside, alone=alone)


class RebuildRun:
    """One rebuild, from its first connection to its findings."""

    mode = "rebuild"

    def __init__(
        self,
        app: App,
        settings: Settings,
        topics: list[str],
        options: RebuildOptions,
        progress: Progress,
        source: KafkaConsumer | None,
    ) -> None:
        self.app, self.settings, self.topics, self.options, self.progress = app, settings, topics, options, progress
        self.source = source or KafkaConsumer(settings, None)
        self.handlers = choose_handlers(app, topics, options.handlers)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.findings = Findings(app.name, self.mode, now, filters(handlers=options.handlers))
        self.stage = ""

    async def run(self) -> Findings:
        """Do the work, and return the findings.

        Raises CannotTell when it ended early.
        """
        began = time.monotonic()
        try:
            with failures_as_cannot_tell(self.settings, self._how_far):
                await self.source.start(self.settings.wait_seconds)
                await self.work()
        finally:
            await self.source.stop(5)
        self.findings.seconds = time.monotonic() - began
        return self.findings

    async def work(self) -> None:
        """Rebuild, and write what was found."""
        findings = self.findings
        rebuilt, compacted = await self.rebuilt()
        findings.rebuilt = {**rebuilt.as_dict(), "compacted": compacted}
        findings.notes += rebuilt.notes

    async def rebuilt(self, outgoing: OutgoingSink | None = None) -> tuple[RebuildResult, list[str]]:
        """Rebuild; return also which of the topics are compacted."""
        options = self.options
        partitions = await find_partitions(self.source, self.topics, ())
        await self._check_log(partitions)
        if self.app.has_patterns:  # what is not replayed is named
            self.app.discover(await self.source.log.topics())
        compacted = [topic for topic in self.topics if await is_compacted(self.settings, topic)]
        rebuilt = await rebuild(
            self.app,
            self.settings,
            self.source,
            partitions,
            handlers=options.handlers or None,
            ignore=options.ignore,
            compare=options.compare,
            base=options.base,
            trace=options.trace,
            tell=self.progress.line,
            announce=self._announce,
            progress=self.advance,
            outgoing=outgoing,
        )
        self.findings.spans = [
            Span(Partition(row["topic"], row["partition"]), row["from"], row["until"]) for row in rebuilt.ranges
        ]
        return rebuilt, compacted

    async def _check_log(self, partitions: Sequence[Partition]) -> None:
        """Read positions, and refuse topics that the ledger does not know."""
        session = await Primary(self.settings, self._how_far).open()
        try:
            _, notes = await read_coverage(session, self.settings, self.app, self.handlers, partitions)
            view = await read_view(
                session, self.settings, self.app, self.handlers, self.topics, partitions, register=False
            )
        finally:
            session.close()
        self.findings.notes += notes
        self.findings.positions = view.positions
        refuse_other_logs(view.ids, await self.source.log.identity(self.topics))

    def _announce(self, calls: int, handlers: Sequence[str]) -> None:
        outside = (
            "their connections to the outside are allowed"
            if self.options.allow_outside
            else "connections of theirs are refused"
        )
        text = (
            f"the rebuild makes up to {calls:,} calls of {', '.join(handlers)}, some again to find the messages behind "
            f"differences; what they write is undone, {outside}"
        )
        self.progress.announce(text)
        self.findings.notes.append(text)

    def advance(self, phase: str, done: int, total: int) -> None:
        """Report progress."""
        self.stage = f"in the rebuild ({phase}: {done:,} of {total:,}); nothing was changed"
        self.progress.progress(phase, done, total)

    def _how_far(self) -> str:
        return self.stage or "before anything was read; nothing was changed"
