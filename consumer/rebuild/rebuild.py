"""The state computed anew from the topics alone, and compared with the real one: what was lost, and what was doubled.

Handlers run through `apply_batch` against copies of their tables (shadow_tables.py), each distinct id once, in order per key, in
one transaction that is undone at its end: nothing is written, nothing is left behind. That transaction sees the real state
as of one moment, and the positions of that moment tell up to where the topics must be replayed, so workers may go on.

Which tables are copied is found out on the way; what is learned of them begins everything again from the start.

What it does not know: what handlers do outside PostgreSQL (that happens again), what stood in a table before the first
message (`base` tells), in which order two topics were settled (the records' times are followed), and which of the two
states is right.
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
from consumer.rebuild import drawn
from consumer.rebuild.chosen_handlers import choose_handlers
from consumer.rebuild.compare import KINDS, Compared, Excuse
from consumer.rebuild.one_snapshot import OneSnapshot
from consumer.rebuild.pass_report import report
from consumer.rebuild.result import Rebuilt
from consumer.rebuild.single_pass import SinglePass
from consumer.rebuild.state import NOTHING_CHANGED, Progress, RebuildState, Tell, kafka_errors
from consumer.rebuild.statement_guard import RestartPass
from consumer.rebuild.variations import BY_RECORDS, FIRST, OTHER_ORDERS, OTHER_ROWS, SAME_ORDER, Variation
from consumer.settings import Settings

_OTHER_NUMBERS = 10_007  # where sequences start in a second rebuild


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
    with postgres_errors(settings):
        state = RebuildState(
            app, settings, source, sorted(set(partitions)), base, tell, progress, OneSnapshot(settings)
        )
        state.handlers, state.notes = choose_handlers(app, state.partitions, handlers, state)
        try:
            found = await _Rebuild(state).run(ignore, compare, sample_max, trace, announce)
        finally:
            await state.snapshot.close()
    found.seconds = round(time.monotonic() - begun, 3)
    return found


@contextmanager
def postgres_errors(settings: Settings) -> Iterator[None]:
    try:
        with translated_errors(settings):
            yield
    except Outage as error:
        raise CannotTell(f"{error}: the rebuild has ended; {NOTHING_CHANGED}") from error


class _Rebuild:
    """The passes of one rebuild, until one knows all tables from its start."""

    def __init__(self, state: RebuildState) -> None:
        self.state = state
        self._announce: Callable[[int, Sequence[str]], None] | None = None  # called once, before the first pass

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
        if self.state.values and compared.differing() and not found.unknown:
            compared = await self._without_drawn(found, compared, ignore, compare, sample_max)
        if compared.differing() and not found.unknown:
            for other in (*OTHER_ORDERS, BY_RECORDS) if self.state.contradicted else OTHER_ORDERS:
                if compared.differing():
                    self.state.tell(
                        "rows differ: rebuilding again in another order, to find what depends on order or time"
                    )
                    await self._keep_stable(found, compared, ignore, compare, other)
            if not compared.differing().isdisjoint(map(str, self.state.beginnings)):
                self.state.tell("rows differ: rebuilding again from other rows, to find what depends on the first ones")
                await self._keep_stable(found, compared, ignore, compare, OTHER_ROWS)
        if trace and compared.differences:
            await self._trace(compared, spans)
        found.differences = [each.as_dict() for each in compared.differences]
        return found

    def _calls(self, spans: Sequence[Span]) -> int:
        """Calls of handlers for one pass over these spans, at most."""
        takers = Counter(topic for handler in self.state.handlers for topic in handler.topics)
        return sum(each.length * takers[each.partition.topic] for each in spans)

    async def _compared(
        self, found: Rebuilt, ignore: Sequence[str], compare: Sequence[str], sample_max: int, other: Variation = FIRST
    ) -> tuple[Compared, list[Span]] | None:
        """One rebuild and its comparison; None when `found.unknown` says why there can be none.

        other: not FIRST for a further rebuild, which reports nothing and sees the real tables as the first one did.
        """
        while True:
            if other is FIRST:
                await self.state.snapshot.take()
            try:
                async with self._pass(other=other) as current:
                    left_out, put_back = await current.columns_named(ignore, compare)
                    spans = await current.spans(found)
                    if found.unknown:
                        found.notes = self.state.notes
                        return None
                    if self._announce is not None:
                        self._announce(self._calls(spans), [each.name for each in self.state.handlers])
                        self._announce = None
                    await current.replay(spans, "replay" if other is FIRST else "again")
                    compared = await current.compare(left_out, put_back, sample_max)
                    if other is FIRST:
                        await report(current, found, compared, spans)
                return compared, spans
            except RestartPass as learned:
                self.state.tell(f"{learned}: beginning again from the start")

    async def _without_drawn(
        self, found: Rebuilt, first: Compared, ignore: Sequence[str], compare: Sequence[str], sample_max: int
    ) -> Compared:
        """Rebuild once more in the same order, and leave out the columns that are drawn, if there are any."""
        self.state.tell("rows differ: rebuilding again in the same order, to find values that are drawn")
        second = await self._compared(Rebuilt(), ignore, compare, sample_max, SAME_ORDER)
        if second is None or not self.state.drawn:
            return first
        found.tables = second[0].tables
        found.notes = [*found.notes, *drawn.notes(self.state.drawn)]
        return second[0]

    async def _keep_stable(
        self, found: Rebuilt, compared: Compared, ignore: Sequence[str], compare: Sequence[str], other: Variation
    ) -> None:
        """Drop the differences that a second rebuild does not show, and give them as reasons for doubt."""
        again = Rebuilt()
        second = await self._compared(again, ignore, compare, 0, other)
        if second is None:
            found.unknown += again.unknown
            return
        for name, count in compared.keep_stable(second[0]).items():
            columns = ", ".join(compared.varying(second[0], name))
            begun = {str(each): ", ".join(sorted(listed)) for each, listed in self.state.beginnings.items()}
            kind, text = _why_unstable(begun.get(name) if other.begins else None, columns)
            found.unknown.append({"kind": kind, "count": count, "text": f"{name}: {count} rows differ, {text}"})
        left = {(table["table"], kind) for table in compared.tables for kind in KINDS if table[kind]}
        compared.differences = [each for each in compared.differences if (str(each.table), each.kind) in left]

    async def _note_partitions(self) -> None:
        with kafka_errors(self.state.settings):
            there = await self.state.source.log.partitions(sorted({each.topic for each in self.state.partitions}))
        for topic, every in there.items():
            left = len(set(every) - set(self.state.partitions))
            if left:
                self.state.notes.append(
                    Excuse(f"{left} of {len(every)} partitions of {topic} were not replayed: their rows are extra")
                )

    @asynccontextmanager
    async def _pass(self, sought: Compared | None = None, other: Variation = FIRST) -> AsyncIterator[SinglePass]:
        connection = await connect(self.state.settings)
        try:
            current = SinglePass(self.state, connection, other)
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
            except RestartPass as again:  # a handler that does other things the second time
                self.state.tell(f"{again}: beginning again from the start")
        for each in compared.differences:
            each.messages, each.explained = current.copies.session.trails[each.place, each.mark].result()


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
