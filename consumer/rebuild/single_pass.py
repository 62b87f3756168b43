"""One pass of a rebuild: a transaction with copies and a replay.

It is rolled back at its end. It raises RestartPass when it learned something about the tables.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Applied, Cause, Dead, Duplicate, Reason, RetryLater, Skipped
from consumer.effects.stage import take_results
from consumer.handler_records import handler_code
from consumer.kafka.bounds import Span
from consumer.postgres import applied_queries
from consumer.postgres import handlers as handler_names
from consumer.postgres import positions as position_table
from consumer.postgres.connection import database_epoch
from consumer.postgres.effects import results_of
from consumer.postgres.errors import Conflict
from consumer.postgres.positions import read_positions
from consumer.rebuild import compare_sql, drawn_columns, table_catalog
from consumer.rebuild.applied_order import OrderEntry
from consumer.rebuild.chosen_handlers import EarlyReject
from consumer.rebuild.compare import ComparisonResult
from consumer.rebuild.compare import compare as compare_tables
from consumer.rebuild.entry_reader import EntryReader
from consumer.rebuild.ledger_history import LedgerHistory
from consumer.rebuild.replay_spans import choose_spans
from consumer.rebuild.result import RebuildResult
from consumer.rebuild.shadow_tables import ShadowTables
from consumer.rebuild.state import RebuildState
from consumer.rebuild.statement_guard import SplitBatch
from consumer.rebuild.table_model import ColumnName
from consumer.rebuild.variations import FIRST, SAME_ORDER, Variation
from consumer.transaction.apply import apply_batch
from consumer.transaction.isolate import Part, TransactionPoisoned
from consumer.transaction.result import BEHIND_RETRY, BatchResult, LedgerIds
from consumer.transaction.settle import next_parts, pause_seconds, settle

_DELAYED_MAX = 50_000  # failed messages, and those behind them, that wait for another attempt
_ANALYZE_AT = 1000  # messages; then whenever there are four times as many
_DOUBTS_MAX = 20_000  # messages, after which a handler that inserts into a table has done so


class SinglePass:
    """One transaction, and the replay in it.

    Call `set_up`, `spans`, `replay` and `compare`, in this order. Every method may raise RestartPass. removed_handlers: names
    that the ledger knows and the App does not. app_starts: offsets where the application began, if not at the beginning of
    the log. applied_by: messages by handler. failures: messages by handler and error.
    """

    def __init__(self, state: RebuildState, connection: Any, variation: Variation = FIRST) -> None:
        self.state = state
        self.variation = variation
        self.connection = connection
        self.copies = ShadowTables(connection, state.settings, state.usage, state.sql_owners, state.base)
        self.copies.guard.writers = state.writers
        self.copies.session.outgoing = state.outgoing
        self.copies.real_columns = state.uncertain_columns if variation.with_real_values else {}
        state.absent = self.copies.guard.absent
        self.ids = LedgerIds(state.app.name, {})
        self.positions: dict[Partition, int] = {}
        self.history = LedgerHistory(connection, self.positions)
        self.removed_handlers: list[str] = []
        self.app_starts: dict[Partition, int] = {}
        self.counts: Counter[str] = Counter()
        self.applied_by: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._settled = 0
        self._round = 0
        self._errors: dict[Delivery, str] = {}  # of messages that wait for another attempt
        self._analyze_at = _ANALYZE_AT
        by_topic: dict[str, list[Handler]] = {}
        for handler in state.handlers:
            for topic in handler.topics:
                by_topic.setdefault(topic, []).append(handler)
        self._topics = sorted(by_topic)
        self._has_effects = any(handler.effect is not None for handler in state.handlers)
        self._scheduler = Scheduler(by_topic, _DELAYED_MAX, state.settings.buffer_bytes_max)
        self.reader = EntryReader(state, self.history, variation, by_topic)

    # -- before the first message -----------------------------------------------------------------------------------

    async def set_up(self, traced: ComparisonResult | None) -> None:
        """Begin the transaction, read the ledger, and create the copies.

        traced: the differences whose messages are to be found, if any.
        """
        await database_epoch(self.connection, self.state.settings)
        await self.copies.begin(self.state.snapshot.name)
        if self.variation.zone is not None:
            await self.connection.execute(f"set local time zone {self.variation.zone:d}")
        await self._assign_numbers()
        await self._read_ledger()
        await self.copies.create(traced)

    async def _assign_numbers(self) -> None:
        """Give handlers and topics their numbers in the ledger.

        Those that the ledger does not know get negative ones.
        """
        state = self.state
        numbers = await handler_names.numbers(self.connection, state.app.name)
        for place, handler in enumerate(state.handlers, 1):
            handler.number = numbers.get(handler.name, -place)
        recorded = (await handler_code.read_code(self.connection, state.app)).code
        self.history.codes = {
            handler.number: recorded[handler.name] for handler in state.handlers if handler.number > 0
        }
        topics = sorted({partition.topic for partition in state.partitions})
        self.removed_handlers = await handler_code.gone(self.connection, state.app, set(topics))
        topic_numbers = await handler_names.topic_numbers(self.connection)
        self.ids = LedgerIds(
            state.app.name, {topic: topic_numbers.get(topic, -place) for place, topic in enumerate(topics, 1)}
        )

    async def _read_ledger(self) -> None:
        horizons = await position_table.horizons(self.connection, self.state.app.name)
        self.ids.logs = await read_positions(self.connection, self.state.app.name, sorted(self.state.partitions))
        for partition, horizon in horizons.items():
            if partition in self.state.partitions:
                self.positions[partition] = horizon.next
                self.app_starts |= {partition: horizon.first} if horizon.first else {}
        numbers = [handler.number for handler in self.state.handlers]
        await self.history.read(numbers, self._topics)
        if self._has_effects:
            await results_of(
                self.connection, ()
            )  # from now on the table is locked by us, and by no handler's statement
        skew = self.state.settings.ledger_clock_skew_hours
        await self.history.omitted.read(self.connection, self.state.app.name, numbers, self._topics, skew)

    async def columns_named(
        self, ignore: Sequence[str], put_back: Sequence[str]
    ) -> tuple[set[ColumnName], set[ColumnName]]:
        """Return the columns that the options name.

        Raises Misconfigured for one that does not exist, or that both options name.
        """
        columns = await table_catalog.all_columns(self.connection) if ignore or put_back else []
        ignored = compare_sql.named(ignore, "--ignore", columns)
        compared = compare_sql.named(put_back, "--compare", columns)
        if both := ignored & compared:
            name, column = min(both)
            raise Misconfigured(f"--ignore and --compare: both name {name}.{column}; name it once")
        return ignored, compared

    async def spans(self, result: RebuildResult) -> list[Span]:
        """Return what to replay; write problems to `result.unknown`."""
        return await choose_spans(self.state, self.connection, self.positions, self.history, result)

    # -- the replay -------------------------------------------------------------------------------------------------

    async def replay(self, spans: Sequence[Span], phase: str) -> None:
        """Run the handlers for all messages of the spans.

        phase: for `progress`. Raises Misconfigured for what a rebuild refuses, and CannotTell for errors of Kafka.
        """
        state = self.state
        self.history.spans = {span.partition: span for span in spans}
        done = {span.partition: span.first for span in spans}
        first, total = sum(done.values()), sum(span.length for span in spans)

        def advanced(partition: Partition, offset: int) -> None:
            done[partition] = offset
            state.progress(phase, sum(done.values()) - first, total)

        state.progress(phase, 0, total)
        await self._begin_replay(spans)
        slices = self.reader.slices(spans, self.ids.logs, advanced)
        try:
            async for entries in slices:
                await self._settle_slice(entries)
                if self.copies.session.is_traced:
                    return
                if self.reader.messages >= _DOUBTS_MAX:
                    self.copies.check_doubts()
        finally:
            await slices.aclose()
        while self._scheduler.delayed:
            await self._retry_failed()
        await self.connection.execute("set local enable_seqscan to default")
        self.copies.check_doubts()
        await self.copies.check_writes()

    async def replay_first(self, spans: Sequence[Span]) -> None:
        """Run handlers for some first messages, to learn which tables they use."""
        self.history.spans = {span.partition: span for span in spans}
        await self._begin_replay(spans)
        slices = self.reader.slices(spans, self.ids.logs, lambda partition, offset: None)
        try:
            async for entries in slices:
                await self._settle_slice(entries)
        finally:
            await slices.aclose()

    async def _begin_replay(self, spans: Sequence[Span]) -> None:
        for span in spans:
            self._scheduler.assign(span.partition, span.first)
        # A copy is small at first, and full of dead row versions later: an index beats a scan for a single row.
        await self.connection.execute("set local enable_seqscan = off")

    async def _settle_slice(self, entries: Sequence[OrderEntry]) -> None:
        """Settle a slice, then the failed messages that may succeed now."""
        await self._settle(self._scheduler.batch_of([entry.delivery for entry in entries]))
        await self._keep_fast()
        self._round += 1
        if self._scheduler.delayed:
            await self._drain()

    async def _drain(self) -> None:
        """Settle every delayed message that may run now."""
        settings = self.state.settings
        while batch := self._scheduler.take(self._round, settings.batch_messages_max, settings.batch_bytes_max):
            await self._settle(batch)
            await self._keep_fast()

    async def _keep_fast(self) -> None:
        analyze = self.counts["applied"] >= self._analyze_at
        if analyze:
            self._analyze_at = self.counts["applied"] * 4
        await self.copies.keep_fast(analyze)

    async def _retry_failed(self) -> None:
        """Try failed messages again, and give up when none succeeds.

        What a message needs may exist by now: partitions and topics have no order between them.
        """
        before = self._settled
        self._round += 1
        await self._drain()
        if self._settled > before:
            return
        self._round += 1
        settings = self.state.settings
        while batch := self._scheduler.take(self._round, settings.batch_messages_max, settings.batch_bytes_max):
            given_up = [delivery for delivery in batch.deliveries if delivery in self._errors]
            rejected = [delivery for delivery in given_up if self._errors[delivery] == EarlyReject.__name__]
            # Dead letters of the ledger were left out before. A message that was applied, and is rejected here, ran in
            # another order then. The others may have been rejected before the ledger existed.
            applied = set(await self.history.ask(applied_queries.applied_places, rejected))
            for delivery in given_up:
                final = delivery in rejected and delivery not in applied
                delivery.outcome = Dead(Reason.REJECTED if final else Reason.FAILED, "")
            await self._settle(batch)

    async def _settle(self, batch: Batch) -> None:
        """Settle a batch as the worker does, but without waiting."""
        if not batch.deliveries:
            self._scheduler.settle(batch, {}, self._scheduler.position_updates(batch, ()))
            return
        if self._has_effects:
            await take_results(self.connection, batch.deliveries)  # without its result, a message fails (CallNotMade)
        async for part, result in settle([batch], self._prepare, self._attempt, self._after_failure):
            self._complete(part.batch, result)

    async def _prepare(self, part: Part) -> bool:
        self.copies.session.batch = part.batch
        return True

    async def _attempt(self, part: Part) -> BatchResult:
        return await apply_batch(
            self.copies.session,
            self.ids,
            self._scheduler,
            part.batch,
            use_savepoints=part.use_savepoints,
            random=lambda: 0.0,
            on_step=lambda _: None,
        )

    async def _after_failure(self, part: Part, error: Exception) -> Sequence[Part]:
        if self.copies.guard.stopped_by is not None:
            raise self.copies.guard.stopped_by from None
        if isinstance(error, SplitBatch):
            return part.halves()
        if not isinstance(error, Conflict | TransactionPoisoned):
            raise error  # an outage too: the copies are gone with their connection
        parts = next_parts(part, error, lambda: 0.0)
        if isinstance(error, Conflict):
            await asyncio.sleep(pause_seconds(part.failures))
        return parts

    def _complete(self, batch: Batch, result: BatchResult) -> None:
        """Count the outcomes of a committed batch, and release its messages."""
        for delivery, outcome in result.outcomes.items():
            match outcome:
                case RetryLater(_, text):
                    delivery.outcome = None
                    if outcome is not BEHIND_RETRY:
                        failure = result.failures.get(delivery)
                        name = type(failure.error).__name__ if failure is not None else text.split(":")[0]
                        self._errors[delivery] = name
                    continue
                case Duplicate(Cause.DEAD_LETTER):
                    self.counts["dead_lettered"] += 1
                case Duplicate():
                    self.counts["repeated"] += 1
                case Dead(Reason.FAILED):
                    self.counts["failed"] += 1
                    error = self._errors.get(delivery, "unknown")
                    if error == EarlyReject.__name__:
                        error = "rejected, although the ledger has it as applied"
                    self.failures[f"{delivery.handler.name}: {error}"] += 1
                case Dead(Reason.REJECTED):
                    self.counts["rejected"] += 1
                case Dead(Reason.ID_CONFLICT):
                    self.counts["id_conflict"] += 1
                case Dead():
                    self.counts["unreadable"] += 1
                    self.history.note_unreadable(delivery)
                case Skipped():
                    self.counts["unsettled"] += 1
                case Applied():
                    pass  # counted below
            self._errors.pop(delivery, None)
        if self._errors:
            for delivery in result.applied:
                self._errors.pop(delivery, None)
        self.counts["applied"] += len(result.applied)
        self.applied_by.update(delivery.handler.name for delivery in result.applied)
        self._settled += len(batch.deliveries) - len(result.delayed)
        self._scheduler.settle(batch, dict.fromkeys(result.delayed, self._round + 1.0), result.position_updates)

    # -- after the last message -------------------------------------------------------------------------------------

    async def compare(self, ignore: set[ColumnName], put_back: set[ColumnName], sample_max: int) -> ComparisonResult:
        """Compare every copy with its table.

        ignore, put_back: columns to leave out, and columns to compare in any case. sample_max: differences of each table.
        """
        result = await self._compare_tables(ignore, put_back, sample_max)
        if self.variation not in (FIRST, SAME_ORDER):
            return result
        state, updates = self.state, self.copies.session.update_counts
        values = await drawn_columns.read_values(self.connection, result, updates, put_back)
        if self.variation is FIRST:
            state.first_comparison, state.first_values = result, values
        elif drawn := drawn_columns.compare_values(state.first_comparison, result, state.first_values, values):
            state.drawn = drawn
            return await self._compare_tables(ignore, put_back, sample_max)
        return result

    async def _compare_tables(
        self, ignore: set[ColumnName], put_back: set[ColumnName], sample_max: int
    ) -> ComparisonResult:
        used = await self.copies.columns_used()
        tables = [(table, self.state.usage[table.name], used[place]) for place, table in enumerate(self.copies.tables)]

        def compared(place: int) -> None:
            self.state.progress("compare", place, len(tables))

        name = f"rebuild {self.variation.name}"
        return await compare_tables(
            self.connection, tables, ignore, put_back, sample_max, compared, name, self.state.drawn
        )
