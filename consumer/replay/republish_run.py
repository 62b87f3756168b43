"""Copies a range of topics into another topic.

`consumer republish` runs it. Imports kafka and postgres. It reads the ledger for positions and for the ids of messages,
and changes nothing in PostgreSQL. An interrupted copy can resume; records of its last part may then be copied twice,
which is harmless (copy_records.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition, Record
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions, parse, resolve
from consumer.replay import copy_records, resume
from consumer.replay.checkpoint import by_partition, partition_rows
from consumer.replay.findings import Findings
from consumer.replay.ledger_view import read_coverage, read_view
from consumer.replay.options import Limits, Progress, filters, key_bytes, validate_filters
from consumer.replay.primary import Primary, failures_as_cannot_tell, refuse_other_logs
from consumer.replay.selection import handlers_of, refuse_no_topics, refuse_shards
from consumer.settings import Settings
from consumer.transaction.result import LedgerIds


@dataclass(frozen=True, slots=True, kw_only=True)
class RepublishOptions:
    """What to copy, and the topic to copy to."""

    target: str
    start: str = "earliest"
    end: str = "latest"
    partitions: tuple[int, ...] = ()
    key: str | bytes | None = None


async def run_republish(
    app: App,
    settings: Settings,
    topics: Sequence[str],
    options: RepublishOptions,
    progress: Progress,
    resumed: dict[str, Any] | None = None,
    source: KafkaConsumer | None = None,
    *,
    limits: Limits | None = None,
) -> Findings:
    """Copy records into the target topic, with their message ids.

    resumed: the state that `progress.save` got from an interrupted run with the same options. source: reads the log; by
    default a consumer without a group.

    Raises Misconfigured for what cannot be copied, CannotTell when it ended early.
    """
    refuse_shards(app)
    if not options.target:
        raise Misconfigured("--to: no topic; name the topic to copy to")
    validate_filters(options.key, None, options.partitions)
    work = _RepublishRun(app, settings, list(dict.fromkeys(topics)), options, progress, limits or Limits())
    return await work.run(source or KafkaConsumer(settings, None), resumed)


class _RepublishRun:
    def __init__(
        self,
        app: App,
        settings: Settings,
        topics: list[str],
        options: RepublishOptions,
        progress: Progress,
        limits: Limits,
    ) -> None:
        refuse_no_topics(app, topics)
        self.app, self.settings, self.topics = app, settings, topics
        self.options, self.progress, self.limits = options, progress, limits
        self.handlers = [handler for handler in handlers_of(app, topics) if handler.idempotent]
        self.key = key_bytes(options.key)
        self.started_at = datetime.now(UTC)
        self.findings = Findings(
            app.name,
            "republish",
            self.started_at.isoformat(timespec="seconds"),
            filters(options.start, options.end, options.partitions, options.key),
        )
        self.copied: dict[str, Any] = {"topic": options.target, "copied": 0, "refused": 0}
        self.primary = Primary(settings, self._how_far)
        self.ids = LedgerIds(app.name, {})
        self.conditions: dict[str, Mapping[str, str | None]] = {}
        self.reached: dict[Partition, int] = {}
        self.saved_at = time.monotonic()

    async def run(self, source: KafkaConsumer, resumed: dict[str, Any] | None) -> Findings:
        began = time.monotonic()
        try:
            with failures_as_cannot_tell(self.settings, self._how_far):
                await source.start(self.settings.wait_seconds)
                await self._prepare(source, resumed)
                await self._copy(source)
        finally:
            self._save(force=True)
            await source.stop(5)
        self.findings.seconds = time.monotonic() - began
        return self.findings

    async def _prepare(self, source: KafkaConsumer, resumed: dict[str, Any] | None) -> None:
        """Read positions and ids, and resolve the range."""
        self.conditions |= resume.conditions_of_code(self.app, handlers_of(self.app, self.topics), self.options)
        session = await self.primary.open()
        try:
            if resumed is not None:
                resume.refuse_changed(resumed.get("conditions"), self.conditions)
                resume.refuse_another_database(resumed.get("epoch"), session.epoch)
            partitions = await find_partitions(source, self.topics, self.options.partitions)
            _, self.findings.notes = await read_coverage(session, self.settings, self.app, self.handlers, partitions)
            view = await read_view(
                session, self.settings, self.app, self.handlers, self.topics, partitions, register=False
            )
        finally:
            session.close()
        self.ids = view.ids
        self.findings.positions = view.positions
        identity = await source.log.identity(self.topics)
        refuse_other_logs(self.ids, identity)
        self.conditions |= resume.conditions_of_logs(identity, self.topics, partitions)
        now = int(self.started_at.timestamp() * 1000)
        start, end = parse(self.options.start, "--from", now), parse(self.options.end, "--until", now)
        if resumed is None:
            self.findings.spans = await resolve(source, partitions, start, end, self.findings.positions)
            return
        resume.restore(resumed, self.conditions, self._restore)
        await resume.refuse_shorter_logs(source, self.findings.spans, self.reached)

    async def _copy(self, source: KafkaConsumer) -> None:
        findings, target = self.findings, self.options.target
        # The handlers that read the copy: those of the target, or, where it is new to the App, of the topics that are read.
        readers = handlers_of(self.app, [target]) or handlers_of(self.app, self.topics)
        copy_records.check(readers, self.topics, target)
        findings.republished = self.copied
        self.reached |= {span.partition: self.reached.get(span.partition, span.first) for span in findings.spans}
        todo = [span._replace(first=self.reached[span.partition]) for span in findings.spans]
        async for part in copy_records.republish(
            self.settings,
            source,
            [span for span in todo if span.length],
            target,
            wanted=self._is_wanted,
            fallback=copy_records.needs_fallback(readers),
            logs=self.ids.logs,
        ):
            self.copied["copied"] += part.copied
            self.copied["refused"] += part.refused
            findings.read[part.partition] = findings.read.get(part.partition, 0) + part.copied + part.refused
            self.reached[part.partition] = part.next
            self.progress.progress("copying", *self._done())
            self._save()
        if self.key is not None and not findings.messages:
            raise Misconfigured("--key: no message of the range has that key; nothing was changed")

    def _is_wanted(self, record: Record) -> bool:
        return self.key is None or record.key == self.key

    # -- how far ----------------------------------------------------------------------------------------------------

    def _done(self) -> tuple[int, int]:
        firsts = {span.partition: span.first for span in self.findings.spans}
        done = sum(offset - firsts[partition] for partition, offset in self.reached.items() if partition in firsts)
        return done, sum(span.length for span in self.findings.spans)

    def _how_far(self) -> str:
        done, total = self._done()
        if not total:
            return "before anything was read; nothing was changed"
        can_resume = self.progress.save is not None and self.reached
        return f"after {done:,} of {total:,} offsets{'; --resume goes on from here' if can_resume else ''}"

    def _save(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.progress.save is None or not self.reached:
            return
        if force or now - self.saved_at >= self.limits.save_seconds:
            self.saved_at = now
            self.progress.save(
                {
                    "epoch": self.primary.epoch,
                    "conditions": self.conditions,
                    "reached": partition_rows(self.reached),
                    "positions": partition_rows(self.findings.positions),
                    "findings": self.findings.as_state(),
                    "republished": self.copied,
                }
            )

    def _restore(self, state: dict[str, Any]) -> None:
        notes = [*self.findings.notes, "resumed after an interruption"]
        self.findings = Findings.from_state(state["findings"])
        self.findings.notes = notes
        self.findings.positions = by_partition(state["positions"])
        self.reached = by_partition(state["reached"])
        self.copied = dict(state["republished"])
