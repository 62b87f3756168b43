"""Runs one replay: prepares, reads the range, and concludes.

Imports kafka, postgres, precheck and handler_records. A range is read without joining the group (kafka/log_reader.py).
Every message goes through the steps of `apply_batch` in transactions that are rolled back (reader.py); with apply,
missing messages go through it again and are stored (apply_missing.py). Limitations: see `replay` in verify.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from consumer import tls
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.log_reader import find_partitions, parse, resolve
from consumer.postgres.connection import dsn_label
from consumer.postgres.session import Session
from consumer.precheck.client import Precheck
from consumer.replay import resume, summary
from consumer.replay.checkpoint import Checkpoint, read_sequences
from consumer.replay.effect_counts import EffectCounts
from consumer.replay.effects import check_countable
from consumer.replay.findings import Findings
from consumer.replay.ledger_view import read_coverage, read_id_rules, read_view
from consumer.replay.primary import failures_as_cannot_tell, refuse_other_logs
from consumer.replay.reader import Reader
from consumer.replay.run import Run
from consumer.replay.selection import handlers_of


class Engine:
    """One replay, from its first connection to its findings.

    resumed: the saved state of an interrupted replay with the same options.
    """

    def __init__(self, run: Run, resumed: dict[str, Any] | None = None) -> None:
        self._run = run
        self._resumed = resumed
        self._checkpoint = Checkpoint(run)

    async def run(self, source: KafkaConsumer) -> Findings:
        """Replay the range, and return the findings.

        Raises CannotTell where a service failed or the task was cancelled; the state is saved before.
        """
        run = self._run
        try:
            with failures_as_cannot_tell(run.settings, run.how_far):
                await source.start(run.settings.wait_seconds)
                await self._replay(source)
        finally:
            await self._checkpoint.read_last_sequences()
            self._checkpoint.save(force=True)
            await run.close()
            await source.stop(5)
        run.findings.seconds = time.monotonic() - run.began
        return run.findings

    async def _replay(self, source: KafkaConsumer) -> None:
        run = self._run
        await self._prepare(source)
        await Reader(run, self._checkpoint.save).read(source)
        run.refuse_nothing_selected()
        await read_sequences(run)
        self._checkpoint.freeze()
        await summary.conclude(run, source, resumed=self._resumed is not None)

    async def _prepare(self, source: KafkaConsumer) -> None:
        """Read what the ledger and the log know, and resolve the range."""
        run = self._run
        session = run.check.session = await run.primary.open()
        chosen = run.handlers if run.options.handlers else handlers_of(run.app, run.topics)
        run.conditions |= resume.conditions_of_code(run.app, chosen, run.options)
        if self._resumed is not None:
            resume.refuse_changed(self._resumed.get("conditions"), run.conditions)
            resume.refuse_another_database(self._resumed.get("epoch"), session.epoch)
        partitions = await find_partitions(source, run.topics, run.options.partitions)
        await self._read_ledger(session, partitions)
        self._connect_precheck()
        identity = await source.log.identity(run.topics)
        refuse_other_logs(run.ids, identity)
        run.conditions |= resume.conditions_of_logs(identity, run.topics, partitions)
        run.conditions |= await resume.conditions_of_ledger(session.connection, partitions, run.check)
        await self._resolve(source, session, partitions)
        await summary.doubt_short_log(run, source)
        await check_countable(session.connection, dsn_label(run.settings.dsn))
        run.check.uncounted = summary.handlers_without_row_counts(run)
        run.findings.effects = run.findings.effects or EffectCounts()

    async def _read_ledger(self, session: Session, partitions: Sequence[Partition]) -> None:
        run, named = self._run, self._run.options.handlers
        exempt, notes = await read_coverage(
            session, run.settings, run.app, run.handlers, partitions, applies=run.applies, named=named
        )
        rules = await read_id_rules(
            session, run.settings, run.app, run.handlers, partitions, applies=run.applies, named=named
        )
        view = await read_view(
            session, run.settings, run.app, run.handlers, run.topics, partitions, register=run.applies
        )
        run.ids = view.ids
        run.id_rule_doubts = rules.doubts
        run.findings.notes += notes
        run.findings.recoded = rules.recoded
        run.findings.positions = view.positions
        run.check.exempt, run.check.floors = exempt, rules.floors
        run.check.topics, run.check.horizons = view.ids.topics, view.horizons

    def _connect_precheck(self) -> None:
        run = self._run
        if (redis_url := tls.redis_url(run.settings)) is None:
            return
        window = run.settings.precheck_window_hours * 3600
        run.precheck = Precheck(redis_url, run.app.name, run.limits.precheck_seconds, window)
        run.precheck.new_epoch(run.primary.epoch)
        if not run.applies:  # apply only adds marks
            run.findings.precheck = {"asked": 0, "hits": 0, "wrong": 0, "unanswered": 0}

    async def _resolve(self, source: KafkaConsumer, session: Session, partitions: Sequence[Partition]) -> None:
        """Resolve the range, or restore that of the interrupted replay."""
        run = self._run
        now = int(run.started_at.timestamp() * 1000)
        start, end = parse(run.options.start, "--from", now), parse(run.options.end, "--until", now)
        if self._resumed is not None:
            await self._checkpoint.restore(self._resumed, source)
            return
        run.findings.spans = await resolve(source, partitions, start, end, run.findings.positions)
        run.dead_letters_before = await resume.last_dead_letter(session.connection)
