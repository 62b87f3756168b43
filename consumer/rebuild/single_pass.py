"""One pass of a rebuild: one transaction with copies, and the replay in it.

Nothing of it lasts. It raises RestartPass when something was learned of the tables.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.message import Partition, Record
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Cause, Dead, Duplicate, Reason, RetryLater, Skipped
from consumer.handler_records import handler_code
from consumer.kafka import log_reader
from consumer.kafka.bounds import Span
from consumer.postgres import applied_queries
from consumer.postgres import handlers as handler_names
from consumer.postgres import positions as position_table
from consumer.postgres.connection import database_epoch
from consumer.postgres.errors import Conflict
from consumer.postgres.positions import read_positions
from consumer.rebuild import compare_sql, drawn
from consumer.rebuild.applied import Applied
from consumer.rebuild.applied_order import LOOKAHEAD, AppliedOrder, Backlog, Entry, transactions
from consumer.rebuild.chosen_handlers import EarlyReject
from consumer.rebuild.compare import Compared
from consumer.rebuild.compare import compare as compare_tables
from consumer.rebuild.result import Rebuilt
from consumer.rebuild.shadow_tables import ShadowTables
from consumer.rebuild.state import RebuildState, kafka_errors
from consumer.rebuild.statement_guard import SplitBatch
from consumer.rebuild.table_model import Name
from consumer.rebuild.variations import FIRST, SAME_ORDER, Variation
from consumer.transaction.apply import apply_batch
from consumer.transaction.identify import identify
from consumer.transaction.isolate import Part, TransactionPoisoned
from consumer.transaction.result import BEHIND, BatchResult, LedgerIds
from consumer.transaction.settle import next_parts, pause_seconds, settle

_PARKED_MAX = 50_000  # failed messages, and those behind them, that wait for their turn
_TRANSACTION_MAX = 100_000  # deliveries that are taken for one transaction of a worker
_ANALYZE_AT = 1000  # messages; then whenever there are four times as many
_DOUBTS_MAX = 20_000  # messages, in which a handler that inserts into a table will have done it once

_COLUMNS = """
select n.nspname, c.relname, a.attname from pg_attribute a
join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and c.relpersistence <> 't' and a.attnum > 0 and not a.attisdropped
  and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema', 'consumer')
"""


class SinglePass:
    """One transaction, and the replay in it. Raises RestartPass when something was learned; nothing of it lasts."""

    def __init__(self, state: RebuildState, connection: Any, other: Variation = FIRST) -> None:
        self.state = state
        self.other = other
        self.connection = connection
        self.copies = ShadowTables(connection, state.settings, state.known, state.owners, state.base)
        self.copies.guard.writers = state.writers
        self.copies.beginnings = state.beginnings if other.begins else {}
        state.absent = self.copies.guard.absent
        self.names = LedgerIds(state.app.name, {})
        self.positions: dict[Partition, int] = {}
        self.applied = Applied(connection, self.positions)
        self.gone: list[str] = []  # handlers that the App no longer has
        self.begun: dict[Partition, int] = {}  # where the application began, if not at the beginning of the log
        self.messages = 0
        self.contradicted: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.applied_by: Counter[str] = Counter()  # handler -> messages
        self.failures: Counter[str] = Counter()
        self.weak_topics: set[str] = set()  # topics of messages without an id
        self._settled = 0
        self._round = 0
        self._errors: dict[Delivery, str] = {}  # of messages that wait for another attempt
        self._analyze_at = _ANALYZE_AT
        topics: dict[str, list[Handler]] = {}
        for handler in state.handlers:
            for topic in handler.topics:
                topics.setdefault(topic, []).append(handler)
        self._by_topic = topics
        self._lane = Scheduler(topics, _PARKED_MAX, state.settings.buffer_bytes_max)

    # -- before the first message -----------------------------------------------------------------------------------

    async def set_up(self, sought: Compared | None) -> None:
        """Begin, read what the ledger knows, and make the copies."""
        await database_epoch(self.connection, self.state.settings)
        await self.copies.begin(self.state.snapshot.name)
        if self.other.zone is not None:
            await self.connection.execute(f"set local time zone {self.other.zone:d}")
        await self._number()
        await self._read_ledger()
        await self.copies.make(sought)

    async def _number(self) -> None:
        """The real numbers of handlers and topics, and negative ones for those that the ledger does not know."""
        state = self.state
        known = await handler_names.numbers(self.connection, state.app.name)
        for place, handler in enumerate(state.handlers, 1):
            handler.number = known.get(handler.name, -place)
        recorded = (await handler_code.look(self.connection, state.app)).code
        self.applied.codes = {each.number: recorded[each.name] for each in state.handlers if each.number > 0}
        self.gone = await handler_code.gone(self.connection, state.app, {each.topic for each in state.partitions})
        topics = await handler_names.topic_numbers(self.connection)
        wanted = sorted({each.topic for each in state.partitions})
        self.names = LedgerIds(state.app.name, {each: topics.get(each, -place) for place, each in enumerate(wanted, 1)})

    async def _read_ledger(self) -> None:
        horizons = await position_table.horizons(self.connection, self.state.app.name)
        self.names.logs = await read_positions(self.connection, self.state.app.name, sorted(self.state.partitions))
        for partition, horizon in horizons.items():
            if partition in self.state.partitions:
                self.positions[partition] = horizon.next
                self.begun |= {partition: horizon.first} if horizon.first else {}
        numbers, topics = [each.number for each in self.state.handlers], sorted(self._by_topic)
        await self.applied.read(numbers, topics)
        skew = self.state.settings.ledger_clock_skew_hours
        await self.applied.left_out.read(self.connection, self.state.app.name, numbers, topics, skew)

    async def columns_named(
        self, ignore: Sequence[str], put_back: Sequence[str]
    ) -> tuple[set[tuple[Name, str]], set[tuple[Name, str]]]:
        """The columns that the options mean. Raises Misconfigured before anything is replayed."""
        rows = await self.connection.fetch(_COLUMNS) if ignore or put_back else []
        columns = [(Name(row[0], row[1]), row[2]) for row in rows]
        ignored = compare_sql.named(ignore, "--ignore", columns)
        compared = compare_sql.named(put_back, "--compare", columns)
        if both := ignored & compared:
            name, column = min(both)
            raise Misconfigured(f"--ignore and --compare both name {name}.{column}: name it once")
        return ignored, compared

    async def spans(self, found: Rebuilt) -> list[Span]:
        """What to replay: from the beginning of the log to where the state is. Problems go into `found.unknown`."""
        state = self.state
        with kafka_errors(state.settings):
            begins, ends = (
                await state.source.log.beginnings(state.partitions),
                await state.source.log.ends(state.partitions),
            )
        known = list(state.partitions)
        ahead = await applied_queries.applied_beyond(
            self.connection,
            [(partition, self.positions.get(partition, begins[partition])) for partition in known],
            [handler.number for handler in state.handlers],
        )
        spans: list[Span] = []
        gone: list[str] = []
        beyond: list[str] = []
        for each in state.partitions:
            begin, position = begins[each], self.positions.get(each)
            if position is None and each in ahead:  # filled by a replay alone: the ledger tells of each message
                position = begin
            if position is None:
                spans.append(Span(each, begin, begin))
                continue
            place = f"{each.topic}:{each.partition}"
            if position < begin or (begin > 0 and state.base is None):
                gone.append(f"{place} begins at offset {begin}")
            if position > ends[each]:
                beyond.append(f"{place} ends at offset {ends[each]} and its position is {position}")
            settled = max(position, ahead.get(each, 0), self.applied.left_out.reach(each))
            spans.append(Span(each, begin, max(begin, min(ends[each], settled))))
        for kind, places, text in (
            ("records_gone", gone, "records were removed from the log, and a rebuild needs all of them, or --base"),
            (
                "log_too_short",
                beyond,
                "the log ends below the position, so it is not the one that the state was made from",
            ),
        ):
            if places:
                more = f" and {len(places) - 3} more" if len(places) > 3 else ""
                found.unknown.append(
                    {"kind": kind, "count": len(places), "text": f"{text}: {', '.join(places[:3])}{more}"}
                )
        if not found.unknown and not any(each.length for each in spans):
            text = "no message of these partitions has been settled, so there is nothing to compute a state from"
            found.unknown.append({"kind": "nothing_settled", "count": len(state.partitions), "text": text})
        found.ranges = [
            {
                "topic": each.partition.topic,
                "partition": each.partition.partition,
                "from": each.first,
                "until": each.end,
            }
            for each in spans
        ]
        return spans

    # -- messages go through ----------------------------------------------------------------------------------------

    async def replay(self, spans: Sequence[Span], phase: str) -> None:
        """Replay all spans, in the order of the records' times as far as the partitions allow."""
        state = self.state
        self.applied.spans = {each.partition: each for each in spans}
        done = {each.partition: each.first for each in spans}
        first, total = sum(done.values()), sum(each.length for each in spans)

        def advanced(partition: Partition, offset: int) -> None:
            done[partition] = offset
            state.progress(phase, sum(done.values()) - first, total)

        for each in spans:
            self._lane.assign(each.partition, each.first)
        state.progress(phase, 0, total)
        # A copy is small at first, and full of dead row versions later: an index beats a scan for a single row.
        await self.connection.execute("set local enable_seqscan = off")
        slices = self._slices(spans, advanced)
        try:
            async for entries in slices:
                await self._settle_slice(entries)
                if self.copies.session.is_traced:
                    return
                if self.messages >= _DOUBTS_MAX:
                    self.copies.check_doubts()
        finally:
            await slices.aclose()
        while self._lane.delayed:
            await self._once_more()
        await self.connection.execute("set local enable_seqscan to default")
        self.copies.check_doubts()
        await self.copies.check_writes()

    async def _slices(
        self, spans: Sequence[Span], advanced: Callable[[Partition, int], None]
    ) -> AsyncGenerator[list[Entry], None]:
        """The deliveries of the spans in the order of their effects, as many at a time as a batch holds.

        Partitions that are ahead are paused, so that no more is kept than the buffer may hold.
        """
        settings, source = self.state.settings, self.state.source
        ends = {each.partition: each.end for each in spans if each.length}
        order = AppliedOrder(
            ends,
            bytes_max=max(1 << 16, settings.buffer_bytes_max // max(1, len(ends))),
            shift=self.other.shift,
            by_records=self.other.by_records,
        )
        self.contradicted = order.contradicted
        for entry in self.applied.edits(self.state.handlers):
            order.add_late(entry)
        most = settings.batch_messages_max
        ready: list[Entry] = []
        paused: set[Partition] = set()
        backlog = Backlog()
        with kafka_errors(settings):
            async for partition, records, following in log_reader.read(source, spans):
                self.messages += len(records)
                backlog.add(partition, records, complete=following >= ends[partition])
                advanced(partition, following)
                while lacking := [each for each in ends if backlog.holds(each) and order.is_low(each)]:
                    for each in lacking:
                        block, complete = backlog.take(each, LOOKAHEAD)
                        order.add(each, await self._entries(each, block), complete=complete)
                    while more := order.take(most):
                        parts, ready = self._parts([*ready, *more], most)
                        for part in parts:
                            yield part
                if following < ends[partition] and (backlog.holds(partition) or not order.is_low(partition)):
                    source.pause(partition)
                    paused.add(partition)
                for low in [each for each in paused if not backlog.holds(each) and order.is_low(each)]:
                    source.resume(low)
                    paused.discard(low)
        parts, ready = self._parts([*ready, *order.take(order.held)], most)
        for part in [*parts, ready] if ready else parts:
            yield part

    def _parts(self, entries: list[Entry], most: int) -> tuple[list[list[Entry]], list[Entry]]:
        """What may be settled together, and what waits for more.

        Handlers that are called for many messages at once run apart from the others, so beside others they are given
        what one transaction of a worker has given them.
        """
        handlers = self.state.handlers
        if len(handlers) == 1 or all(each.batch is None and each.concurrency == 1 for each in handlers):
            whole = len(entries) - len(entries) % most
            return [entries[n : n + most] for n in range(0, whole, most)], entries[whole:]
        parts = transactions(entries)
        last = parts[-1] if parts else []
        if len(last) > (_TRANSACTION_MAX if last and last[0].applied_at is not None else most):
            return parts, []
        return parts[:-1], last

    async def _entries(self, partition: Partition, records: Sequence[Record]) -> list[Entry]:
        deliveries = [
            Delivery(handler, record) for record in records for handler in self._by_topic.get(partition.topic, ())
        ]
        if not deliveries:
            return []
        self.weak_topics |= identify(deliveries, self.names.logs)
        return await self.applied.entries(deliveries)

    async def _settle_slice(self, entries: Sequence[Entry]) -> None:
        """Settle what is next, and try again what has failed: what it needs may be there by now."""
        await self._settle(self._lane.batch_of([each.delivery for each in entries]))
        await self._keep_fast()
        self._round += 1
        if self._lane.delayed:
            await self._drain()

    async def _drain(self) -> None:
        """Settle everything that may run now."""
        settings = self.state.settings
        while batch := self._lane.take(self._round, settings.batch_messages_max, settings.batch_bytes_max):
            await self._settle(batch)
            await self._keep_fast()

    async def _keep_fast(self) -> None:
        analyze = self.counts["applied"] >= self._analyze_at
        if analyze:
            self._analyze_at = self.counts["applied"] * 4
        await self.copies.keep_fast(analyze)

    async def _once_more(self) -> None:
        """Try again what has failed: what it needs may be there by now. If nothing is gained it has failed for good."""
        before = self._settled
        self._round += 1
        await self._drain()
        if self._settled > before:
            return
        self._round += 1
        settings = self.state.settings
        while batch := self._lane.take(self._round, settings.batch_messages_max, settings.batch_bytes_max):
            given_up = [each for each in batch.deliveries if each in self._errors]
            rejected = [each for each in given_up if self._errors[each] == EarlyReject.__name__]
            # The ledger's dead letters were left out before. What it has as applied, and is rejected here, was met in
            # another order: that is not known here. The rest may have been rejected before there was a ledger.
            applied = await self._are_applied(rejected)
            for delivery in given_up:
                final = delivery in rejected and delivery not in applied
                delivery.outcome = Dead(Reason.REJECTED if final else Reason.FAILED, "")
            await self._settle(batch)

    async def _settle(self, batch: Batch) -> None:
        """As the worker settles a batch, but that nothing is waited for."""
        if not batch.deliveries:
            self._lane.settle(batch, {}, self._lane.position_updates(batch, ()))
            return
        async for part, result in settle([batch], self._prepare, self._attempt, self._after_failure):
            self._settled_part(part.batch, result)

    async def _prepare(self, part: Part) -> bool:
        self.copies.session.batch = part.batch
        return True

    async def _attempt(self, part: Part) -> BatchResult:
        return await apply_batch(
            self.copies.session,
            self.names,
            self._lane,
            part.batch,
            use_savepoints=part.use_savepoints,
            random=lambda: 0.0,
            on_step=lambda _: None,
        )

    async def _after_failure(self, part: Part, error: Exception) -> Sequence[Part]:
        if self.copies.guard.verdict is not None:
            raise self.copies.guard.verdict from None
        if isinstance(error, SplitBatch):
            return part.halves()
        if not isinstance(error, Conflict | TransactionPoisoned):
            raise error  # an outage too: the copies are gone with their connection
        parts = next_parts(part, error, lambda: 0.0)
        if isinstance(error, Conflict):
            await asyncio.sleep(pause_seconds(part.failures))
        return parts

    async def _are_applied(self, deliveries: Sequence[Delivery]) -> set[Delivery]:
        """Those that the ledger has as applied."""
        return set(await self.applied.ask(applied_queries.applied_places, deliveries))

    def _settled_part(self, part: Batch, done: BatchResult) -> None:
        for delivery, outcome in done.outcomes.items():
            match outcome:
                case RetryLater(_, text):
                    delivery.outcome = None
                    failure = done.failures.get(delivery)
                    if outcome is not BEHIND:
                        self._errors[delivery] = (
                            type(failure.error).__name__ if failure is not None else text.split(":")[0]
                        )
                    continue
                case Duplicate(Cause.DEAD_LETTER):
                    self.counts["dead_lettered"] += 1
                case Duplicate():
                    self.counts["repeated"] += 1
                case Dead(Reason.FAILED):
                    self.counts["failed"] += 1
                    error = self._errors.get(delivery, "unknown")
                    told = "rejected, although the ledger has it as applied" if error == EarlyReject.__name__ else error
                    self.failures[f"{delivery.handler.name}: {told}"] += 1
                case Dead(Reason.REJECTED):
                    self.counts["rejected"] += 1
                case Dead(Reason.ID_CONFLICT):
                    self.counts["id_conflict"] += 1
                case Dead():
                    self.counts["unreadable"] += 1
                    self.applied.note_unreadable(delivery)
                case Skipped():
                    self.counts["unsettled"] += 1
            self._errors.pop(delivery, None)
        if self._errors:
            for delivery in done.applied:
                self._errors.pop(delivery, None)
        self.counts["applied"] += len(done.applied)
        self.applied_by.update(each.handler.name for each in done.applied)
        self._settled += len(part.deliveries) - len(done.delayed)
        self._lane.settle(part, dict.fromkeys(done.delayed, self._round + 1.0), done.position_updates)

    # -- and after the last -----------------------------------------------------------------------------------------

    async def compare(
        self, ignore: set[tuple[Name, str]], put_back: set[tuple[Name, str]], sample_max: int
    ) -> Compared:
        """Compare every copy with its table."""
        used = await self.copies.columns_used()
        tables = [(each, self.state.known[each.name], used[place]) for place, each in enumerate(self.copies.tables)]

        def compared(place: int) -> None:
            self.state.progress("compare", place, len(tables))

        async def look() -> Compared:
            rebuild = f"rebuild {self.other.name}"
            return await compare_tables(
                self.connection, tables, ignore, put_back, sample_max, compared, rebuild, self.state.drawn
            )

        found = await look()
        if self.other in (FIRST, SAME_ORDER):
            state, values = (
                self.state,
                await drawn.values_of(self.connection, found, self.copies.session.update_counts, put_back),
            )
            if self.other is FIRST:
                state.first, state.values = found, values
            elif now_drawn := drawn.drawn_in(state.first, found, state.values, values):
                state.drawn = now_drawn
                found = await look()
        return found
