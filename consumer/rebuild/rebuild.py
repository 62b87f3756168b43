"""The state computed anew from the topics alone, and compared with the real one: what was lost, and what was doubled.

Handlers run through `apply_batch` against copies of their tables (rebuild/copies.py), each distinct id once, in order per key, in
one transaction that is undone at its end: nothing is written, nothing is left behind. That transaction sees the real state
as of one moment, and the positions of that moment tell up to where the topics must be replayed, so workers may go on.

Which tables are copied is found out on the way; what is learned of them begins everything again from the start.

What it does not know: what handlers do outside PostgreSQL (that happens again), what stood in a table before the first
message (`base` tells), in which order two topics were settled (the records' times are followed), and which of the two
states is right.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from consumer.app import App
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import CannotTell, Misconfigured, Reject
from consumer.core.handler import Call, Handler
from consumer.core.message import Partition, Record
from consumer.core.ordering import Scheduler
from consumer.core.outcome import Cause, Dead, Duplicate, Reason, RetryLater, Skipped
from consumer.core.retry import Retry
from consumer.handler_records import handler_code
from consumer.kafka import log_reader
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.kafka.errors import KafkaError, LogTruncated
from consumer.postgres import applied_queries
from consumer.postgres import handlers as handler_names
from consumer.postgres import positions as position_table
from consumer.postgres.connection import connect, database_epoch, translated_errors
from consumer.postgres.errors import Conflict, Outage
from consumer.postgres.positions import read_positions
from consumer.rebuild import compare_sql, drawn
from consumer.rebuild.absent_rows import AbsentRows, Statement, statements
from consumer.rebuild.applied import RETRIES_MAX, Applied
from consumer.rebuild.applied_order import LOOKAHEAD, AppliedOrder, Backlog, Entry, transactions
from consumer.rebuild.beginnings import other_beginnings
from consumer.rebuild.compare import KINDS, Compared, Excuse
from consumer.rebuild.compare import compare as compare_tables
from consumer.rebuild.copies import TEXTS_MAX, Again, Copies, Halve, calling
from consumer.rebuild.drawn_values import Place, Values
from consumer.rebuild.first_rows import leave_out_older, older_than_handlers
from consumer.rebuild.one_snapshot import OneSnapshot
from consumer.rebuild.table_model import Name, TableUsage
from consumer.settings import Settings
from consumer.transaction.apply import apply_batch
from consumer.transaction.identify import identify
from consumer.transaction.isolate import Part, TransactionPoisoned
from consumer.transaction.result import BEHIND, BatchResult, LedgerIds
from consumer.transaction.settle import next_parts, pause_seconds, settle

_PARKED_MAX = 50_000  # failed messages, and those behind them, that wait for their turn
_TRANSACTION_MAX = 100_000  # deliveries that are taken for one transaction of a worker
_ANALYZE_AT = 1000  # messages; then whenever there are four times as many
_DOUBTS_MAX = 20_000  # messages, in which a handler that inserts into a table will have done it once
_OTHER_NUMBERS = 10_007  # where sequences start in a second rebuild
_FOR_EVER = Retry(attempts=1 << 31, base=0, cap=0)  # as long as it helps: see _Pass._once_more
_CHANGED = "nothing was changed, and it can be run again"

_COLUMNS = """
select n.nspname, c.relname, a.attname from pg_attribute a
join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and c.relpersistence <> 't' and a.attnum > 0 and not a.attisdropped
  and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema', 'consumer')
"""


@dataclass(frozen=True, slots=True)
class _Variation:
    """In what a further rebuild differs from the first one.

    shift: how many microseconds later each partition comes than the one before it: transactions that are less than a second
    apart may have overlapped, and then met a row in either order. zone: hours from UTC. begins: with real values, where
    it is not known what a table began with. by_records: in the order of the records' times, not of the ledger's.
    """

    shift: int = 0
    zone: int | None = None
    begins: bool = False
    by_records: bool = False
    same: bool = False  # as the first one, to find values that are drawn

    @property
    def name(self) -> str:
        return repr(dataclasses.replace(self, same=False))


_FIRST = _Variation()
# In one of the two zones it is another day than in the server's, at any time.
_OTHER_ORDERS = (_Variation(-1_000_000, zone=14), _Variation(1_000_000, zone=-12))
_OTHER_ROWS = _Variation(begins=True)
_BY_RECORDS = _Variation(by_records=True)
_SAME_ORDER = _Variation(same=True)

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild has found. Counts but `messages` are of deliveries: of a message, and each handler that takes it."""

    messages: int = 0
    applied: int = 0
    repeated: int = 0
    dead_lettered: int = 0  # by the ledger, so they were left out
    rejected: int = 0
    failed: int = 0
    unreadable: int = 0
    ranges: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[dict[str, Any]] = field(default_factory=list)  # what makes the answer uncertain
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether no table differs, as far as could be told."""
        return not any(each["missing"] or each["extra"] or each["different"] for each in self.tables)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it. excuses: the notes that may explain a difference, so that it is no proof of a fault."""
        return {**dataclasses.asdict(self), "excuses": [each for each in self.notes if isinstance(each, Excuse)]}


async def rebuild(
    app: App,
    settings: Settings,
    source: KafkaConsumer,
    partitions: Sequence[Partition],
    *,
    handlers: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    compare: Sequence[str] = (),
    base: str | None = None,
    trace: bool = True,
    sample_max: int = 20,
    tell: Tell = lambda _: None,
    progress: Progress = lambda phase, done, total: None,
    announce: Callable[[int, Sequence[str]], None] = lambda calls, handlers: None,
) -> Rebuilt:
    """Compute the state anew from these partitions and compare it with the real one. Nothing is changed, whatever happens.

    app: with its lifespan entered. source: started, without a group. handlers: their names, by default all that take one
    of the topics. ignore, compare: columns to leave out, or to put back. base: SQL for the first rows of the tables. trace:
    replay once more to find the messages behind the differences. sample_max: differences told of each table. announce: gets
    the number of calls and the handlers, before the first call.

    Raises Misconfigured for what cannot be rebuilt, CannotTell when a service went away in the middle: one line each.
    """
    begun = time.monotonic()
    with _told_in_one_line(settings):
        work = _Rebuild(app, settings, source, partitions, handlers, base, tell, progress)
        try:
            found = await work.run(ignore, compare, sample_max, trace, announce)
        finally:
            await work.snapshot.close()
    found.seconds = round(time.monotonic() - begun, 3)
    return found


@contextmanager
def _told_in_one_line(settings: Settings) -> Iterator[None]:
    try:
        with translated_errors(settings):
            yield
    except Outage as error:
        raise CannotTell(f"{error}: the rebuild has ended; {_CHANGED}") from error


@contextmanager
def _kafka_told_in_one_line(settings: Settings) -> Iterator[None]:
    try:
        yield
    except LogTruncated as error:
        raise CannotTell(f"{error}: records were removed while they were read; {_CHANGED}") from error
    except (KafkaError, OSError) as error:  # TimeoutError is an OSError
        text = str(error) or type(error).__name__
        raise CannotTell(
            f"Kafka at {settings.kafka_bootstrap_servers}: {text}: the rebuild has ended; {_CHANGED}"
        ) from error


class _Rebuild:
    """The whole of it: passes, each in a transaction of its own, until one knows all tables from its start."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        source: KafkaConsumer,
        partitions: Sequence[Partition],
        handlers: Sequence[str] | None,
        base: str | None,
        tell: Tell,
        progress: Progress,
    ) -> None:
        self.app = app
        self.settings = settings
        self.source = source
        self.partitions = sorted(set(partitions))
        self.base = base
        self.tell = tell
        self.progress = progress
        self.owners: dict[str, str] = {}  # deferred SQL -> the handler that it was first seen from
        self.writers: set[str] = set()  # handlers that have written something, in any pass
        self.known: dict[Name, TableUsage] = {}
        self.contradicted: Counter[str] = Counter()  # of the first pass: see AppliedOrder
        self.absent: AbsentRows | None = None  # of the pass that runs
        self.snapshot = OneSnapshot(settings)
        self.beginnings: Mapping[Name, frozenset[str]] = {}  # of further rebuilds: see rebuild/beginnings.py
        self.first = Compared()  # what the first rebuild gives, and values that may be drawn
        self.values: dict[Place, Values] = {}
        self.drawn: frozenset[Place] = frozenset()
        self._announce: Callable[[int, Sequence[str]], None] | None = None  # told once, before the first pass
        self.handlers, self.notes = _chosen(app, self.partitions, handlers, self)

    async def run(
        self,
        ignore: Sequence[str],
        compare: Sequence[str],
        sample_max: int,
        trace: bool,
        announce: Callable[[int, Sequence[str]], None],
    ) -> Rebuilt:
        """Replay, compare, and replay again for what differs: is it stable, and which messages are behind it?"""
        found = Rebuilt()
        self._announce = announce
        await self._note_partitions()
        first = await self._compared(found, ignore, compare, sample_max)
        if first is None:
            return found
        compared, spans = first
        if self.values and compared.differing() and not found.unknown:
            compared = await self._without_drawn(found, compared, ignore, compare, sample_max)
        if compared.differing() and not found.unknown:
            for other in (*_OTHER_ORDERS, _BY_RECORDS) if self.contradicted else _OTHER_ORDERS:
                if compared.differing():
                    self.tell("rows differ: rebuilding again in another order, to find what depends on order or time")
                    await self._keep_stable(found, compared, ignore, compare, other)
            if not compared.differing().isdisjoint(map(str, self.beginnings)):
                self.tell("rows differ: rebuilding again from other rows, to find what depends on the first ones")
                await self._keep_stable(found, compared, ignore, compare, _OTHER_ROWS)
        if trace and compared.differences:
            await self._trace(compared, spans)
        found.differences = [each.as_dict() for each in compared.differences]
        return found

    def _calls(self, spans: Sequence[Span]) -> int:
        """Calls of handlers for one pass over these spans, at most."""
        takers = Counter(topic for handler in self.handlers for topic in handler.topics)
        return sum(each.length * takers[each.partition.topic] for each in spans)

    async def _compared(
        self, found: Rebuilt, ignore: Sequence[str], compare: Sequence[str], sample_max: int, other: _Variation = _FIRST
    ) -> tuple[Compared, list[Span]] | None:
        """One rebuild and its comparison; None when `found.unknown` says why there can be none.

        other: not _FIRST for a further rebuild, which reports nothing and sees the real tables as the first one did.
        """
        while True:
            if other is _FIRST:
                await self.snapshot.take()
            try:
                async with self._pass(other=other) as current:
                    left_out, put_back = await current.columns_named(ignore, compare)
                    spans = await current.spans(found)
                    if found.unknown:
                        found.notes = self.notes
                        return None
                    if self._announce is not None:
                        self._announce(self._calls(spans), [each.name for each in self.handlers])
                        self._announce = None
                    await current.replay(spans, "replay" if other is _FIRST else "again")
                    compared = await current.compare(left_out, put_back, sample_max)
                    if other is _FIRST:
                        await current.report(found, compared, spans)
                return compared, spans
            except Again as learned:
                self.tell(f"{learned}: beginning again from the start")

    async def _without_drawn(
        self, found: Rebuilt, first: Compared, ignore: Sequence[str], compare: Sequence[str], sample_max: int
    ) -> Compared:
        """Rebuild once more in the same order, and leave out the columns that are drawn, if there are any."""
        self.tell("rows differ: rebuilding again in the same order, to find values that are drawn")
        second = await self._compared(Rebuilt(), ignore, compare, sample_max, _SAME_ORDER)
        if second is None or not self.drawn:
            return first
        found.tables = second[0].tables
        found.notes = [*found.notes, *drawn.notes(self.drawn)]
        return second[0]

    async def _keep_stable(
        self, found: Rebuilt, compared: Compared, ignore: Sequence[str], compare: Sequence[str], other: _Variation
    ) -> None:
        """Drop the differences that a second rebuild does not show, and give them as reasons for doubt."""
        again = Rebuilt()
        second = await self._compared(again, ignore, compare, 0, other)
        if second is None:
            found.unknown += again.unknown
            return
        for name, count in compared.keep_stable(second[0]).items():
            columns = ", ".join(compared.varying(second[0], name))
            begun = {str(each): ", ".join(sorted(listed)) for each, listed in self.beginnings.items()}
            kind, text = _why_unstable(begun.get(name) if other.begins else None, columns)
            found.unknown.append({"kind": kind, "count": count, "text": f"{name}: {count} rows differ, {text}"})
        left = {(table["table"], kind) for table in compared.tables for kind in KINDS if table[kind]}
        compared.differences = [each for each in compared.differences if (str(each.table), each.kind) in left]

    async def _note_partitions(self) -> None:
        with _kafka_told_in_one_line(self.settings):
            there = await self.source.log.partitions(sorted({each.topic for each in self.partitions}))
        for topic, every in there.items():
            left = len(set(every) - set(self.partitions))
            if left:
                self.notes.append(
                    Excuse(f"{left} of {len(every)} partitions of {topic} were not replayed: their rows are extra")
                )

    @asynccontextmanager
    async def _pass(self, sought: Compared | None = None, other: _Variation = _FIRST) -> AsyncIterator[_Pass]:
        connection = await connect(self.settings)
        try:
            current = _Pass(self, connection, other)
            current.copies.numbers_from = _OTHER_NUMBERS if other.shift else 1
            await current.set_up(sought)
            yield current
            await connection.execute("rollback")
        finally:
            # Whatever has happened: an open transaction is undone when its connection ends.
            try:
                with suppress(Exception):
                    await connection.close(timeout=5)
            finally:
                connection.terminate()

    async def _trace(self, compared: Compared, spans: Sequence[Span]) -> None:
        """Replay again, and note the messages that touch a row of the sample."""
        while True:
            try:
                async with self._pass(compared) as current:
                    await current.replay(spans, "trace")
                break
            except Again as again:  # a handler that does other things the second time
                self.tell(f"{again}: beginning again from the start")
        for each in compared.differences:
            each.messages, each.explained = current.copies.session.trails[each.place, each.mark].told()


def _chosen(
    app: App, partitions: Sequence[Partition], wanted: Sequence[str] | None, work: _Rebuild
) -> tuple[list[Handler], list[str]]:
    """The handlers to run, as copies, and what there is to say about the others."""
    topics = {each.topic for each in partitions}
    for name in wanted or ():
        if name not in app.handlers:
            near = difflib.get_close_matches(name, app.handlers, 1)
            raise Misconfigured(
                f"App {app.name!r} has no handler {name!r}"
                + (f", did you mean {near[0]!r}?" if near else "")
                + f" (it has: {', '.join(app.handlers)})"
            )
        if not topics & set(app.handlers[name].topics):
            raise Misconfigured(f"handler {name!r} takes none of the topics {', '.join(sorted(topics))}")
    named = [
        each for each in app.handlers.values() if topics & set(each.topics) and (not wanted or each.name in wanted)
    ]
    chosen = [each for each in named if each.idempotent]
    if not chosen:
        raise Misconfigured(
            f"no handler with a ledger takes {', '.join(sorted(topics)) or 'anything'}: nothing to rebuild"
        )
    notes: list[str] = [
        f"handler {each.name} opted out of the ledger and was left out" for each in named if not each.idempotent
    ]
    others = [each.name for each in app.handlers.values() if each.idempotent and each not in chosen]
    if others:
        notes.append(Excuse(f"not run: {', '.join(others)}; what they wrote to the same tables is extra here"))
    for each in chosen:
        if left := sorted(set(each.topics) - topics):
            text = f"handler {each.name} also takes {', '.join(left)}: not replayed, so those rows are extra here"
            notes.append(Excuse(text))
    copies = [
        dataclasses.replace(each, retry=_FOR_EVER, call=_named(each.name, each.call, work))
        for each in chosen
        if each.call is not None
    ]
    return copies, notes


def _why_unstable(begun: str | None, columns: str) -> tuple[str, str]:
    """What may explain rows that two rebuilds make differently. begun: columns that began otherwise in the second one."""
    if begun is not None:
        text = (
            f"and other rows do when the table begins with other values (columns {begun}): what was there before the first "
            "message is not known; --base FILE gives the first rows"
        )
        return "beginning_unknown", text
    text = (
        f"and two rebuilds differ in them too (columns {columns}): they depend on the order of messages whose order is not "
        "known, or on when their handler runs; --ignore leaves a column out"
    )
    return "depends_on_order", text


class _Rejected(Exception):
    """The handler raised Reject. It may only be early here: partitions and topics have no order between them."""


def _named(name: str, call: Call, work: _Rebuild) -> Call:
    """A handler's call that tells whose SQL it is, for the sentence that refuses it, and what its updates look for."""
    owners, writers = work.owners, work.writers

    async def named(value: Any, message: Any, tx: Any) -> object:
        noted: list[Statement] = []
        token, sent = calling.set(name), statements.set(noted)
        try:
            result = await call(value, message, tx)
            if work.absent is not None:
                id = tx.subject.id if isinstance(tx.subject, Delivery) else None
                work.absent.note([*noted, *tx.writes] if noted else tx.writes, name, id)
            return result
        except Reject as error:
            raise _Rejected from error
        finally:
            calling.reset(token)
            statements.reset(sent)
            for sql, _ in tx.writes:
                writers.add(name)
                if sql not in owners:
                    if len(owners) >= TEXTS_MAX:
                        owners.clear()
                    owners[sql] = name

    return named


class _Pass:
    """One transaction, and the replay in it. Raises Again when something was learned; nothing of it lasts."""

    def __init__(self, work: _Rebuild, connection: Any, other: _Variation = _FIRST) -> None:
        self.work = work
        self.other = other
        self.connection = connection
        self.copies = Copies(connection, work.settings, work.known, work.owners, work.base)
        self.copies.guard.writers = work.writers
        self.copies.beginnings = work.beginnings if other.begins else {}
        work.absent = self.copies.guard.absent
        self.names = LedgerIds(work.app.name, {})
        self.positions: dict[Partition, int] = {}
        self.applied = Applied(connection, self.positions)
        self.gone: list[str] = []  # handlers that the App no longer has
        self.begun: dict[Partition, int] = {}  # where the application began, if not at the beginning of the log
        self.messages = 0
        self.contradicted: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.applied_by: Counter[str] = Counter()  # handler -> messages
        self.failures: Counter[str] = Counter()
        self._weak: set[str] = set()  # topics of messages without an id
        self._settled = 0
        self._round = 0
        self._errors: dict[Delivery, str] = {}  # of messages that wait for another attempt
        self._analyze_at = _ANALYZE_AT
        topics: dict[str, list[Handler]] = {}
        for handler in work.handlers:
            for topic in handler.topics:
                topics.setdefault(topic, []).append(handler)
        self._by_topic = topics
        self._lane = Scheduler(topics, _PARKED_MAX, work.settings.buffer_bytes_max)

    # -- before the first message -----------------------------------------------------------------------------------

    async def set_up(self, sought: Compared | None) -> None:
        """Begin, read what the ledger knows, and make the copies."""
        await database_epoch(self.connection, self.work.settings)
        await self.copies.begin(self.work.snapshot.name)
        if self.other.zone is not None:
            await self.connection.execute(f"set local time zone {self.other.zone:d}")
        await self._number()
        await self._read_ledger()
        await self.copies.make(sought)

    async def _number(self) -> None:
        """The real numbers of handlers and topics, and negative ones for those that the ledger does not know."""
        work = self.work
        known = await handler_names.numbers(self.connection, work.app.name)
        for place, handler in enumerate(work.handlers, 1):
            handler.number = known.get(handler.name, -place)
        recorded = (await handler_code.look(self.connection, work.app)).code
        self.applied.codes = {each.number: recorded[each.name] for each in work.handlers if each.number > 0}
        self.gone = await handler_code.gone(self.connection, work.app, {each.topic for each in work.partitions})
        topics = await handler_names.topic_numbers(self.connection)
        wanted = sorted({each.topic for each in work.partitions})
        self.names = LedgerIds(work.app.name, {each: topics.get(each, -place) for place, each in enumerate(wanted, 1)})

    async def _read_ledger(self) -> None:
        horizons = await position_table.horizons(self.connection, self.work.app.name)
        self.names.logs = await read_positions(self.connection, self.work.app.name, sorted(self.work.partitions))
        for partition, horizon in horizons.items():
            if partition in self.work.partitions:
                self.positions[partition] = horizon.next
                self.begun |= {partition: horizon.first} if horizon.first else {}
        numbers, topics = [each.number for each in self.work.handlers], sorted(self._by_topic)
        await self.applied.read(numbers, topics)
        skew = self.work.settings.ledger_clock_skew_hours
        await self.applied.left_out.read(self.connection, self.work.app.name, numbers, topics, skew)

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
        work = self.work
        with _kafka_told_in_one_line(work.settings):
            begins, ends = (
                await work.source.log.beginnings(work.partitions),
                await work.source.log.ends(work.partitions),
            )
        known = list(work.partitions)
        ahead = await applied_queries.applied_beyond(
            self.connection,
            [(partition, self.positions.get(partition, begins[partition])) for partition in known],
            [handler.number for handler in work.handlers],
        )
        spans: list[Span] = []
        gone: list[str] = []
        beyond: list[str] = []
        for each in work.partitions:
            begin, position = begins[each], self.positions.get(each)
            if position is None and each in ahead:  # filled by a replay alone: the ledger tells of each message
                position = begin
            if position is None:
                spans.append(Span(each, begin, begin))
                continue
            place = f"{each.topic}:{each.partition}"
            if position < begin or (begin > 0 and work.base is None):
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
            found.unknown.append({"kind": "nothing_settled", "count": len(work.partitions), "text": text})
        found.ranges = [
            {"topic": each.partition.topic, "partition": each.partition.partition, "from": each.first, "to": each.end}
            for each in spans
        ]
        return spans

    # -- messages go through ----------------------------------------------------------------------------------------

    async def replay(self, spans: Sequence[Span], phase: str) -> None:
        """Replay all spans, in the order of the records' times as far as the partitions allow."""
        work = self.work
        self.applied.spans = {each.partition: each for each in spans}
        done = {each.partition: each.first for each in spans}
        first, total = sum(done.values()), sum(each.length for each in spans)

        def advanced(partition: Partition, offset: int) -> None:
            done[partition] = offset
            work.progress(phase, sum(done.values()) - first, total)

        for each in spans:
            self._lane.assign(each.partition, each.first)
        work.progress(phase, 0, total)
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
        settings, source = self.work.settings, self.work.source
        ends = {each.partition: each.end for each in spans if each.length}
        order = AppliedOrder(
            ends,
            bytes_max=max(1 << 16, settings.buffer_bytes_max // max(1, len(ends))),
            shift=self.other.shift,
            by_records=self.other.by_records,
        )
        self.contradicted = order.contradicted
        for entry in self.applied.edits(self.work.handlers):
            order.add_late(entry)
        most = settings.batch_messages_max
        ready: list[Entry] = []
        paused: set[Partition] = set()
        backlog = Backlog()
        with _kafka_told_in_one_line(settings):
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
        handlers = self.work.handlers
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
        self._weak |= identify(deliveries, self.names.logs)
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
        settings = self.work.settings
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
        settings = self.work.settings
        while batch := self._lane.take(self._round, settings.batch_messages_max, settings.batch_bytes_max):
            given_up = [each for each in batch.deliveries if each in self._errors]
            rejected = [each for each in given_up if self._errors[each] == _Rejected.__name__]
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
        self.copies.session.part = part.batch
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
        if isinstance(error, Halve):
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
                    told = "rejected, although the ledger has it as applied" if error == _Rejected.__name__ else error
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
        tables = [(each, self.work.known[each.name], used[place]) for place, each in enumerate(self.copies.tables)]

        def compared(place: int) -> None:
            self.work.progress("compare", place, len(tables))

        async def look() -> Compared:
            rebuild = f"rebuild {self.other.name}"
            return await compare_tables(
                self.connection, tables, ignore, put_back, sample_max, compared, rebuild, self.work.drawn
            )

        found = await look()
        if self.other in (_FIRST, _SAME_ORDER):
            work, values = (
                self.work,
                await drawn.values_of(self.connection, found, self.copies.session.updates, put_back),
            )
            if self.other is _FIRST:
                work.first, work.values = found, values
            elif now_drawn := drawn.drawn_in(work.first, found, work.values, values):
                work.drawn = now_drawn
                found = await look()
        return found

    async def report(self, found: Rebuilt, compared: Compared, spans: Sequence[Span]) -> None:
        """Put what was counted into the answer."""
        counts = self.counts
        found.messages, found.tables = self.messages, compared.tables
        found.applied, found.repeated = counts["applied"], counts["repeated"]
        found.dead_lettered, found.rejected = counts["dead_lettered"], counts["rejected"]
        found.failed, found.unreadable = counts["failed"], counts["unreadable"]
        if counts["failed"]:
            errors = ", ".join(f"{name} ({count})" for name, count in self.failures.most_common(3))
            text = f"{counts['failed']} messages failed in the rebuild, so their effects are not in it: {errors}"
            found.unknown.append({"kind": "failed", "count": counts["failed"], "text": text})
        if unreadable := await self.applied.unreadable_but_applied():
            text = f"{unreadable} messages were applied, and today's code cannot read them: their effects are not in the rebuild"
            found.unknown.append({"kind": "unreadable_now", "count": unreadable, "text": text})
        for name, count in sorted(self.applied_by.items()):
            if name not in self.copies.guard.writers:
                text = (
                    f"handler {name} ran for {count} messages and wrote nothing here, so none of its effects was compared "
                    "(a flag or a setting that is missing where the rebuild runs?)"
                )
                found.unknown.append({"kind": "nothing_compared", "count": count, "text": text})
        found.unknown += [*self.copies.unknown(), *await self.copies.rows_gone(compared)]
        tables, known = self.copies.tables, self.work.known
        self.work.beginnings = other_beginnings(tables, known, compared.tables, self.copies.guard.upserted)
        counts["id_conflict"] += self.applied.conflicts
        if counts["id_conflict"]:
            text = f"{counts['id_conflict']} messages have an id that another payload had before: the first one counts here"
            found.unknown.append({"kind": "id_conflict", "count": counts["id_conflict"], "text": text})
        found.notes = [*self._notes_of_code(), *self.work.notes, *self._notes(spans)]
        if self.work.base is None and not self.applied.unrecorded:
            # With messages that the ledger does not know, old rows may be theirs.
            await self._judge_older(found, compared)

    async def _judge_older(self, found: Rebuilt, compared: Compared) -> None:
        """Leave out rows from before the handlers, where nothing else can explain a difference; else doubt their tables."""
        guard, known, differing = self.copies.guard, self.work.known, compared.differing()
        numbers = [each.number for each in self.work.handlers]
        uses = {name: use for name, use in sorted(known.items()) if str(name) in differing}
        is_added_to = all(use.inserted and name.table not in guard.changed for name, use in uses.items())
        may_be_others = found.unknown or guard.unplanned or any(isinstance(each, Excuse) for each in found.notes)
        if uses and is_added_to and not may_be_others:
            older = await leave_out_older(self.connection, compared, numbers)
            if older:
                found.notes += older
                return
        settled = set(self.work.beginnings)  # further rebuilds tell
        names = [name for name, use in uses.items() if use.inserted and name not in settled]
        found.unknown += await older_than_handlers(self.connection, names, numbers, compared.tables)

    def _notes_of_code(self) -> list[str]:
        """Effects that may be of another code than the one that ran here."""
        notes: list[str] = []
        for handler in self.work.handlers:
            if count := self.applied.with_other_code[handler.number]:
                since = handler_code.since_text(self.applied.codes[handler.number])
                notes.append(
                    Excuse(
                        f"handler {handler.name}: {count} messages were, or may have been, applied by other code than today's, {since}"
                    )
                )
        if self.gone:
            names = ", ".join(self.gone)
            notes.append(Excuse(f"not in the App any more: {names}; what they wrote to the same tables is extra here"))
        return notes

    def _notes(self, spans: Sequence[Span]) -> list[str]:
        """What a person should know about this answer."""
        notes: list[str] = []
        for handler in self.work.handlers:
            if handler.number < 0:
                notes.append(Excuse(f"handler {handler.name} is not known to the ledger: it has never run here"))
        for topic in sorted(self._weak):
            notes.append(
                f"messages of {topic} have no id: their offset is used, so one that was produced twice counts twice"
            )
        for each in spans:
            place = f"{each.partition.topic}:{each.partition.partition}"
            if each.first > 0 and self.work.base is not None:
                notes.append(f"{place} begins at offset {each.first}: --base is taken for the state before that record")
            if each.partition not in self.positions:
                what = "what the ledger has as applied was replayed" if each.length else "nothing of it is settled"
                notes.append(f"{place} has no position: {what}")
            if self.begun.get(each.partition, 0) > each.first:
                text = (
                    f"{place} was begun at offset {self.begun[each.partition]}: what stands before was settled elsewhere, or "
                    "never, and was replayed all the same"
                )
                notes.append(Excuse(text))
        if self.applied.too_many_retries:
            text = f"more than {RETRIES_MAX:,} dead letters were retried; their order inside a transaction was not followed"
            notes.append(Excuse(text))
        self.work.contradicted = self.contradicted
        for name, count in sorted(self.contradicted.items()):
            notes.append(
                f"handler {name}: the ledger has {count} messages as applied after later messages of their key (retried or repaired "
                "later, or PostgreSQL's clock stepped back), so rows that differ are rebuilt in the order of the records too"
            )
        if empty := sum(each.length for each in spans) - self.messages:
            notes.append(
                f"{empty} offsets hold no record: markers of transactions, or a compacted topic, of which no state can be made"
            )
        if count := self.counts["unsettled"] - self.applied.left_out.exempt:
            notes.append(f"{count} messages above the positions are not settled yet and were left out")
        notes += self.applied.left_out.notes()
        if count := self.counts["rejected"]:
            notes.append(Excuse(f"{count} messages were rejected here that are no dead letters in the ledger"))
        if count := self.counts["unreadable"]:
            notes.append(f"{count} messages cannot be read")
        return [*notes, *self.copies.notes()]
