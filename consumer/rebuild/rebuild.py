"""Rebuilds tables from the topics, and compares them with the real ones.

Handlers run through `apply_batch` on copies of their tables (shadow_tables.py), each distinct id once, in order per key, in
one transaction that is rolled back: nothing is written. The transaction sees the real state as of one moment. The positions
of that moment say how far the topics must be replayed, so workers may go on meanwhile.

A pass finds out which tables handlers write to. What it learns makes it start over, with copies of more tables; of a long
range, passes over its first messages learn most of this cheaply. Where rows differ, further passes find what depends on
order, on time or on first rows, and which messages are behind the difference.

Limitations: effects outside PostgreSQL happen again; what a table held before the first message is unknown (`base` gives
it); the order between topics follows the times of the records; which of the two states is right is unknown.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from consumer.app import App
from consumer.core.errors import CannotTell
from consumer.core.message import Partition
from consumer.kafka.bounds import Span
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres.connection import connect, translated_errors
from consumer.postgres.errors import Outage
from consumer.rebuild import drawn_columns
from consumer.rebuild.chosen_handlers import choose_handlers
from consumer.rebuild.compare import KINDS, ComparisonResult, Excuse
from consumer.rebuild.pass_report import report
from consumer.rebuild.result import RebuildResult
from consumer.rebuild.shared_snapshot import SharedSnapshot
from consumer.rebuild.single_pass import SinglePass
from consumer.rebuild.state import NOTHING_CHANGED, OutgoingSink, Progress, RebuildState, Tell, kafka_errors
from consumer.rebuild.statement_guard import RestartPass
from consumer.rebuild.variations import BY_RECORDS, FIRST, OTHER_ORDERS, OTHER_ROWS, SAME_ORDER, Variation
from consumer.settings import Settings

_OTHER_NUMBERS = 10_007  # where sequences start in a second rebuild
_LONG_RANGE = 20_000  # messages, from which passes over the first ones come before the rebuild
_FIRST_MESSAGES = 1000  # of all partitions together


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
    outgoing: OutgoingSink | None = None,
) -> RebuildResult:
    """Rebuild tables from these partitions and compare them; change nothing.

    Args:
        app: with its lifespan entered.
        settings: with the DSN of the database.
        source: started, without a group.
        partitions: all of them, or rows of the others count as extra.
        handlers: names; by default all that take one of the topics.
        ignore: columns to leave out.
        compare: columns to compare in any case.
        base: SQL for the first rows of the tables.
        trace: replay once more, to find the messages behind the differences.
        sample_max: differences in the result, of each table.
        tell: gets a line when the rebuild starts over.
        progress: gets the phase, and how much of it is done.
        announce: gets the number of calls and the handlers, before the first call.
        outgoing: gets what the handlers publish; rows that differ are not looked into then.

    Raises Misconfigured for what cannot be rebuilt, and CannotTell if a service fails meanwhile: one line each.
    """
    began = time.monotonic()
    await app.open_registry(settings)
    with postgres_errors(settings):
        state = RebuildState(
            app, settings, source, sorted(set(partitions)), base, tell, progress, SharedSnapshot(settings)
        )
        state.outgoing = outgoing
        state.handlers, state.notes = choose_handlers(app, state.partitions, handlers, state)
        try:
            result = await _Rebuild(state, ignore, compare, sample_max, announce).run(trace)
        finally:
            await state.snapshot.close()
    result.seconds = round(time.monotonic() - began, 3)
    return result


@contextmanager
def postgres_errors(settings: Settings) -> Iterator[None]:
    """Turn an outage of PostgreSQL into CannotTell."""
    try:
        with translated_errors(settings):
            yield
    except Outage as error:
        raise CannotTell(f"{error}: the rebuild has ended; {NOTHING_CHANGED}") from error


class _Rebuild:
    """Runs passes, until one has copies of all tables from its start."""

    def __init__(
        self,
        state: RebuildState,
        ignore: Sequence[str],
        compare: Sequence[str],
        sample_max: int,
        announce: Callable[[int, Sequence[str]], None],
    ) -> None:
        self.state = state
        self._ignore = ignore
        self._compare = compare
        self._sample_max = sample_max
        self._announce: Callable[[int, Sequence[str]], None] | None = announce  # None after the first call
        self._has_learned = False  # which tables the first messages need

    async def run(self, trace: bool) -> RebuildResult:
        """Replay and compare, then replay again for the rows that differ."""
        state, result = self.state, RebuildResult()
        await self._note_partitions()
        first = await self._replay(result)
        if first is None:
            return result
        compared, spans = first
        if state.first_values and compared.differing() and not result.unknown:
            compared = await self._without_drawn(result, compared)
        if state.outgoing is not None:
            await self._repeat_outgoing(state.outgoing)
            return result
        if compared.differing() and not result.unknown:
            for variation in (*OTHER_ORDERS, BY_RECORDS) if state.contradicted else OTHER_ORDERS:
                if compared.differing():
                    state.tell("rows differ: rebuilding again in another order, to find what depends on order or time")
                    await self._keep_stable(result, compared, variation)
            if not compared.differing().isdisjoint(map(str, state.uncertain_columns)):
                state.tell("rows differ: rebuilding again from other rows, to find what depends on the first ones")
                await self._keep_stable(result, compared, OTHER_ROWS)
        if trace and compared.differences:
            await self._trace(compared, spans)
        result.differences = [difference.as_dict() for difference in compared.differences]
        return result

    async def _repeat_outgoing(self, outgoing: OutgoingSink) -> None:
        """Run the handlers again if Kafka has something else.

        What differs from run to run proves nothing.
        """
        if await outgoing.differs():
            for variation in (SAME_ORDER, OTHER_ORDERS[-1]):
                self.state.tell("outgoing records differ: running the handlers again, to find what differs by itself")
                await self._replay(RebuildResult(), variation)

    def _announce_once(self, spans: Sequence[Span]) -> None:
        """Announce once how many calls a pass can make at most."""
        if self._announce is None:
            return
        takers = Counter(topic for handler in self.state.handlers for topic in handler.topics)
        calls = sum(span.length * takers[span.partition.topic] for span in spans)
        self._announce(calls, [handler.name for handler in self.state.handlers])
        self._announce = None

    async def _replay(
        self, result: RebuildResult, variation: Variation = FIRST
    ) -> tuple[ComparisonResult, list[Span]] | None:
        """Rebuild once and compare.

        Returns None if `result.unknown` says why this is impossible. A variation reports nothing else, sees the real tables
        as the first rebuild did, and has no sample unless it repeats the first.
        """
        is_first = variation is FIRST
        sample_max = self._sample_max if variation in (FIRST, SAME_ORDER) else 0
        while True:
            if is_first:
                await self.state.snapshot.take()
            outgoing = self.state.outgoing
            if outgoing is not None:
                await outgoing.begin()
            try:
                async with self._pass(variation=variation) as current:
                    ignored, put_back = await current.columns_named(self._ignore, self._compare)
                    spans = await current.spans(result)
                    if result.unknown:
                        result.notes = self.state.notes
                        return None
                    self._announce_once(spans)
                    if is_first and not self._has_learned and sum(span.length for span in spans) >= _LONG_RANGE:
                        # Each start reads ahead in every partition: while much is learned, there is little to read.
                        await current.replay_first(_heads(spans, _FIRST_MESSAGES))
                        self._has_learned = True
                        continue
                    await current.replay(spans, "replay" if is_first else "again")
                    if outgoing is not None:
                        await outgoing.end()
                    compared = await current.compare(ignored, put_back, sample_max)
                    if is_first:
                        await report(current, result, compared, spans)
                return compared, spans
            except RestartPass as learned:
                self.state.tell(f"{learned}: starting over")

    async def _without_drawn(self, result: RebuildResult, first: ComparisonResult) -> ComparisonResult:
        """Rebuild again in the same order, to leave out drawn columns.

        Returns the comparison without them, or the first one if there are none.
        """
        self.state.tell("rows differ: rebuilding again in the same order, to find values that are drawn")
        second = await self._replay(RebuildResult(), SAME_ORDER)
        if second is None or not self.state.drawn:
            return first
        compared, _ = second
        result.tables = compared.tables
        result.notes = [*result.notes, *drawn_columns.notes(self.state.drawn)]
        return compared

    async def _keep_stable(self, result: RebuildResult, compared: ComparisonResult, variation: Variation) -> None:
        """Drop differences that a variation does not show.

        They become reasons in `result.unknown`.
        """
        other = RebuildResult()
        second = await self._replay(other, variation)
        if second is None:
            result.unknown += other.unknown
            return
        varied, _ = second
        for name, count in compared.keep_stable(varied).items():
            columns = ", ".join(compared.varying(varied, name))
            uncertain = {str(table): ", ".join(sorted(names)) for table, names in self.state.uncertain_columns.items()}
            kind, text = _why_unstable(uncertain.get(name) if variation.with_real_values else None, columns)
            result.unknown.append({"kind": kind, "count": count, "text": f"{name}: {count} rows differ, {text}"})
        left = {(table["table"], kind) for table in compared.tables for kind in KINDS if table[kind]}
        compared.differences = [
            difference for difference in compared.differences if (str(difference.table), difference.kind) in left
        ]

    async def _note_partitions(self) -> None:
        """Note partitions of the topics that are not replayed."""
        replayed = self.state.partitions
        with kafka_errors(self.state.settings):
            by_topic = await self.state.source.log.partitions(sorted({partition.topic for partition in replayed}))
        for topic, partitions in by_topic.items():
            left = len(set(partitions) - set(replayed))
            if left:
                self.state.notes.append(
                    Excuse(f"{left} of {len(partitions)} partitions of {topic} were not replayed: their rows are extra")
                )

    @asynccontextmanager
    async def _pass(
        self, traced: ComparisonResult | None = None, variation: Variation = FIRST
    ) -> AsyncIterator[SinglePass]:
        connection = await connect(self.state.settings, init=self.state.app.connection_init)
        try:
            current = SinglePass(self.state, connection, variation)
            current.copies.sequence_start = _OTHER_NUMBERS if variation.shift else 1
            await current.set_up(traced)
            yield current
            await connection.execute("rollback")
        finally:
            # The server rolls back an open transaction when its connection ends.
            try:
                with suppress(Exception):
                    await connection.close(timeout=5)
            finally:
                connection.terminate()

    async def _trace(self, compared: ComparisonResult, spans: Sequence[Span]) -> None:
        """Replay again, and give each difference the messages behind it."""
        while True:
            try:
                async with self._pass(compared) as current:
                    await current.replay(spans, "trace")
                break
            except RestartPass as learned:  # a handler uses the tables in another way this time
                self.state.tell(f"{learned}: starting over")
        for difference in compared.differences:
            trail = current.copies.session.trails[difference.place, difference.mark]
            difference.messages, difference.explained = trail.result()


def _heads(spans: Sequence[Span], messages_max: int) -> list[Span]:
    """Return the first offsets of each span, in all at most messages_max."""
    share = max(1, messages_max // len(spans))
    return [span._replace(end=min(span.end, span.first + share)) for span in spans]


def _why_unstable(uncertain: str | None, columns: str) -> tuple[str, str]:
    """Return kind and text of why two rebuilds differ.

    uncertain: the columns that began with other values in the second one, if any.
    """
    if uncertain is not None:
        text = (
            f"and other rows do when the table begins with other values (columns {uncertain}): what was there before the "
            "first message is not known; --base FILE gives the first rows"
        )
        return "beginning_unknown", text
    text = (
        f"and two rebuilds differ in them too (columns {columns}): they depend on the order of messages whose order is not "
        "known, or on when their handler runs; --ignore leaves a column out"
    )
    return "depends_on_order", text
