"""An App on a database and a log: deliver, crash, compare.

Knows what was delivered and what each transaction wrote; simulated_worker.py delivers. Limitation: only the test knows what the
effects should be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.handler import Call
from consumer.core.handler_signature import Function
from consumer.core.message import LogRecord, Partition
from consumer.postgres import positions
from consumer.settings import Settings
from consumer.testing.messages import (
    EFFECT_STEPS,
    SHOWN_MAX,
    STEPS,
    Delivered,
    Outside,
    Sent,
    lines,
    partition_of,
    record_of,
)
from consumer.testing.outside_rows import OutsideRows
from consumer.testing.outside_statements import Watch
from consumer.testing.server import connection_to
from consumer.testing.simulated_worker import Key, Round, SimulatedWorker, Written
from consumer.testing.undisturbed import Contents, contents, differences


class Trial:
    """An App on a database and a log of its own.

    The fixture `exactly_once` creates one.

    dsn: the address of the database, for resources of the application that connect by themselves. Between two calls no
    connection is held and no handler runs. A caller may not assume that two tasks can deliver to one App at once.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        resources: Mapping[str, object] | None,
        copied: Callable[[], AbstractAsyncContextManager[Settings]],
        effects: Mapping[str, Function] | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._copied = copied  # a copy of the database, for as long as it is needed
        self._resources = resources
        self._effects = effects or {}
        self._log: list[tuple[Sent, LogRecord]] = []
        self._applied: set[Key] = set()
        self._rounds: list[Round] = []
        self._outside: list[Outside] = []

    @property
    def dsn(self) -> str:
        """Return the address of its database, with the password."""
        return self._settings.dsn

    async def deliver(
        self, *messages: Sent, batch: int | None = None, crash_at: str | None = None, retry: bool = True
    ) -> list[Delivered]:
        """Append messages to the log and deliver what is not settled yet.

        Delivers as one worker does from its start to its end.

        batch: most messages in one transaction; all of them by default. crash_at: one of STEPS; when the first
        transaction comes to it, its connection is dropped as in a power cut, and delivering ends. retry: False leaves a
        failed message waiting; otherwise it is tried again at once, up to its attempts. Returns what became of each
        message at each handler, in their order. Without messages, it goes on where a crash was: what was left is
        delivered again.

        Raises Misconfigured for a topic that no handler takes, a value that cannot become JSON, a batch below 1 and an
        unknown step; nothing was delivered then.
        """
        self._check(batch, crash_at)
        added = self._records_of(messages)
        what = f"deliver({len(messages)} message{'' if len(messages) == 1 else 's'}, {_options(batch, crash_at)})"
        return await self._deliver(what, batch, crash_at, retry, added)

    async def deliver_again(
        self, *, batch: int | None = 1, crash_at: str | None = None, retry: bool = True
    ) -> list[Delivered]:
        """Deliver everything again from the beginning of the log.

        The same bytes at the same offsets, in other batches.

        batch: one message at a time by default; None: all of them at once. Everything else is as in `deliver`.
        """
        self._check(batch, crash_at)
        what = f"deliver_again({_options(batch, crash_at)})"
        return await self._deliver(what, batch, crash_at, retry, again=True)

    async def prove(self, *messages: Sent, batch: int | None = None, ignore: Collection[str] = ()) -> None:
        """Deliver with a crash at every step, and compare the rows.

        Every transaction crashes at every step; the rows are compared with those of one undisturbed run.

        batch: most messages in one transaction; all of them by default. ignore: TABLE, COLUMN or TABLE.COLUMN to leave out
        of the comparison: values that do not follow from the message. Raises AssertionError where a message did not end,
        where none was applied, where rows are missing, extra or different from an undisturbed run on a copy of the
        database, where anything was written again, and where a handler ran a statement outside its transaction.

        Limitations: columns whose default PostgreSQL computes are not compared; a state of the process that calls before
        this one have filled acts on both runs alike; effects outside this database are not seen. What the effects should
        be is for the test to say, after this.
        """
        __tracebackhide__ = True
        self._check(batch, None)
        added = self._records_of(messages)
        measure = await self._undisturbed(added, None if batch == 1 else 1, ignore)
        self._log += added
        before: object = None
        # Each time around, the first transaction that is not stored yet meets every step. It ends when that stores
        # nothing more: all is settled, or what is left would fail for ever, since a crash begins its attempts again.
        while (left := await self._is_left()) and left != before:
            for step in _steps_of(self._app):
                await self._deliver(f"prove: crash at {step!r}", batch, step, True)
            before = left
        ended = await self._deliver("prove: without a crash", batch, None, True)
        if waiting := [delivered for delivered in ended if delivered.outcome == "waiting"]:
            raise AssertionError(f"not every message has ended:\n{lines(waiting)}")
        self.assert_nothing_outside()  # first: such rows are extra rows, too
        await self._compare(measure, ignore)
        for size in (1, None):
            await self.deliver_again(batch=size)
            self.assert_no_new_effects()
        self.assert_nothing_outside()

    async def _undisturbed(
        self, added: Sequence[tuple[Sent, LogRecord]], batch: int | None, ignore: Collection[str]
    ) -> dict[str, Contents]:
        """Return the tables after one run without a crash.

        On a copy of the database, in batches of another size.
        """
        async with self._copied() as settings:
            other = Trial(self._app, settings, self._resources, self._copied, self._effects)
            other._log = [*self._log, *added]
            other._applied = set(self._applied)
            other._outside = self._outside
            async with connection_to(self._settings) as connection:
                rows = OutsideRows(connection)
                await rows.start([])
                await other._deliver("undisturbed", batch, None, True)
                # No transaction is ours here: a handler that knows this database's address has written to it.
                for table in await rows.changed():
                    text = f"unknown: it changed rows of {table}, while the messages were applied to a copy of the database"
                    self._outside.append(Outside(" or ".join(self._app.handlers), "", "another connection", text))
            async with connection_to(settings) as connection:
                return await contents(connection, ignore)

    async def _compare(self, measure: Mapping[str, Contents], ignore: Collection[str]) -> None:
        __tracebackhide__ = True
        async with connection_to(self._settings) as connection:
            problems = differences(measure, await contents(connection, ignore))
        if problems:
            raise AssertionError("with crashes, other rows are stored than in one undisturbed run:\n" + lines(problems))

    # -- what is to be so ----------------------------------------------------------------------------------------------

    def assert_no_new_effects(self) -> None:
        """Raise AssertionError for new effects.

        The last call may write nothing, and no call may apply a message a second time.

        Counted are the rows that each committed transaction inserted, updated and deleted outside schema `consumer`,
        and the sequences that the last call moved. The error lists tables, rows, handlers and messages, as far as that
        is known. It is an error, too, if the call would show nothing: nothing was applied yet, or the last call delivered
        nothing. A caller may not assume that effects outside this database were seen.
        """
        __tracebackhide__ = True
        ends = self._rounds[-1].delivered if self._rounds else []
        if not self._applied:
            raise AssertionError(f"nothing was applied yet, so this would show nothing\n{lines(ends)}".rstrip())
        if not ends:
            raise AssertionError("the last call delivered nothing, so this would show nothing")
        problems: list[str] = []
        for number, round in enumerate(self._rounds, 1):
            is_last = number == len(self._rounds)
            for written in round.written:
                shows_repetition = written.is_known and not written.first
                if written.again or (written.rows and (is_last or shows_repetition)):
                    problems.append(f"call {number}, {round.what}: {_account(written)}")
            if is_last and round.sequences:
                problems.append(f"call {number}, {round.what}: moved the sequence {', '.join(round.sequences)}")
        if problems:
            raise AssertionError(
                "there are new effects:\n" + "\n".join(f"  {problem}" for problem in problems[:SHOWN_MAX])
            )

    def assert_nothing_outside(self) -> None:
        """Raise AssertionError for statements and rows outside the transaction.

        See `outside_statements`.
        """
        __tracebackhide__ = True
        if self._outside:
            raise AssertionError(
                "handlers ran statements outside their transactions, which a crash repeats and a rollback keeps:\n"
                + lines(self._outside)
            )

    def outside_statements(self) -> list[Outside]:
        """What handlers with a transaction did on other connections, so far.

        Rows: what other transactions stored in this database until the end of the call that delivered, and what they had
        written and not ended by then, whatever connection, driver or process it was. Only tables are named. Statements:
        all by asyncpg in this process, on whatever server, by the handler or a task it started; by any other driver or
        process, the last statement of each session in this database that ran one while a handler was called.

        Limitations: with `concurrency=` above 1, another call may have done it. Not seen are rows that were inserted and
        deleted again within one call, and what is stored after the delivering call has ended by a transaction that began
        to write after it; sequences; other databases through other drivers; HTTP; files; and what handlers that opted out do.
        """
        return list(self._outside)

    # -- the database --------------------------------------------------------------------------------------------------

    async def fetch(self, sql: str, *args: Any) -> list[Any]:
        """Run a query on a connection of its own; return asyncpg's rows.

        The App's connection_init has set its codecs.
        """
        async with connection_to(self._settings, self._app.connection_init) as connection:
            return list(await connection.fetch(sql, *args))

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """Return the first column of a query's first row, or None."""
        async with connection_to(self._settings, self._app.connection_init) as connection:
            return await connection.fetchval(sql, *args)

    async def execute(self, sql: str, *args: Any) -> str:
        """Run and commit a statement; return its command tag.

        Its rows are not counted as effects.
        """
        async with connection_to(self._settings, self._app.connection_init) as connection:
            return str(await connection.execute(sql, *args))

    # -- how it delivers -----------------------------------------------------------------------------------------------

    def _check(self, batch: int | None, crash_at: str | None) -> None:
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
            raise Misconfigured(f"batch={batch!r}: not a size; give the most messages in one transaction, at least 1")
        if crash_at is not None and crash_at not in (*STEPS, *EFFECT_STEPS):
            steps = ", ".join(map(repr, (*STEPS, *EFFECT_STEPS)))
            raise Misconfigured(f"crash_at={crash_at!r}: no step; use one of {steps}")

    def _records_of(self, messages: Sequence[Sent]) -> list[tuple[Sent, LogRecord]]:
        """Encode messages as records at the end of the log.

        Raises Misconfigured for one that cannot be encoded.
        """
        ends: dict[Partition, int] = {}
        for _, record in self._log:
            ends[Partition(record.topic, record.partition)] = record.offset + 1
        added: list[tuple[Sent, LogRecord]] = []
        for message in messages:
            if not isinstance(message, Sent):
                raise Misconfigured(
                    f'deliver: a {type(message).__name__} is no message; give Sent("topic", value, id=…)'
                )
            partition = partition_of(message, self._app)
            offset = ends.get(partition, 0)
            added.append((message, record_of(message, offset)))
            ends[partition] = offset + 1
        return added

    async def _is_left(self) -> dict[Partition, int]:
        """Return the positions of partitions that hold something unsettled."""
        async with connection_to(self._settings) as connection:
            positions = await self._positions(connection)
        return {
            (partition := Partition(record.topic, record.partition)): positions.get(partition, 0)
            for _, record in self._unsettled(positions)
        }

    async def _positions(self, connection: Any) -> dict[Partition, int]:
        return await positions.next_offsets(connection, self._app.name)

    def _unsettled(self, positions: Mapping[Partition, int]) -> list[tuple[Sent, LogRecord]]:
        """Return what lies at or after the positions, as it was sent."""
        return [
            (message, record)
            for message, record in self._log
            if record.offset >= positions.get(Partition(record.topic, record.partition), 0)
        ]

    async def _deliver(
        self,
        what: str,
        batch: int | None,
        crash_at: str | None,
        retry: bool,
        added: Sequence[tuple[Sent, LogRecord]] = (),
        again: bool = False,
    ) -> list[Delivered]:
        async with (
            _exclusive(self._app),
            _bound(self._app, self._resources, self._settings),
            _standing_in(self._app, self._effects),
            connection_to(self._settings) as connection,
        ):
            self._log += added
            if again:
                await positions.rewind(connection, self._app.name)
            records = self._unsettled(await self._positions(connection))
            if crash_at is not None and not records:
                raise Misconfigured(
                    f"crash_at={crash_at!r}: there is nothing to deliver, so nothing would crash; deliver messages"
                )
            round, watch = Round(what), Watch(connection, self._outside)
            worker = SimulatedWorker(self._app, self._settings, round, records, crash_at, self._applied, watch)
            await worker.run(batch or len(records) or 1, retry)
        self._rounds.append(round)
        return list(round.delivered)


def _steps_of(app: App) -> Sequence[str]:
    """Return the steps at which a crash repeats what is repeatable.

    Of an effect that is called at most once, a crash around the call leaves a dead letter.
    """
    effects = [handler.effect for handler in app.handlers.values() if handler.effect is not None]
    return (*EFFECT_STEPS, *STEPS) if effects and all(effect.remembers for effect in effects) else STEPS


def _options(batch: int | None, crash_at: str | None) -> str:
    return f"batch={batch}" + (f", crash_at={crash_at!r}" if crash_at else "")


def _account(written: Written) -> str:
    rows = "; ".join(f"{table}: {counts}" for table, counts in written.rows.items()) or "no rows"
    who = [f"\n    by {message}, a second time" for message in written.again]
    who += [
        f"\n    by {message}, for the first time: that is right, so deliver_again() once more, then assert"
        for message in written.first
    ]
    if not who:
        who = ["\n    by no message that is known" if written.is_known else "\n    in the transaction before the crash"]
    return rows + "".join(who[:SHOWN_MAX])


_busy: set[int] = set()


@asynccontextmanager
async def _exclusive(app: App) -> AsyncIterator[None]:
    """Use an App alone, and restore its handlers afterwards.

    They have one database and one set of resources at a time.
    """
    if id(app) in _busy:
        raise Misconfigured(
            f"{app.name!r}: it is being delivered to already; await one call of deliver after the other"
        )
    _busy.add(id(app))
    before = [(handler, handler.call, handler.number) for handler in app.handlers.values()]
    try:
        yield
    finally:
        for handler, call, number in before:
            handler.call, handler.number = call, number
        _busy.discard(id(app))


@asynccontextmanager
async def _bound(app: App, resources: Mapping[str, object] | None, settings: Settings) -> AsyncIterator[None]:
    await app.open_registry(settings)
    if resources is None:
        async with app.running():
            yield
        return
    for handler in app.handlers.values():
        handler.bind(resources)
    yield


@asynccontextmanager
async def _standing_in(app: App, stand_ins: Mapping[str, Function]) -> AsyncIterator[None]:
    """Let a test's functions answer instead of the other systems.

    Raises Misconfigured for an effect without one, and for a name of no effect.
    """
    effects = {name: handler.effect for name, handler in app.handlers.items() if handler.effect is not None}
    names = {*effects, *(f"{name}.unsure" for name, effect in effects.items() if effect.unsure is not None)}
    if unknown := sorted(set(stand_ins) - names):
        raise Misconfigured(f"effects={{{unknown[0]!r}: …}}: {app.name!r} has no such effect; name one of it")
    for name, effect in effects.items():
        if name not in stand_ins:
            raise Misconfigured(
                f"{name!r}: it calls another system, which a test must not; give exactly_once an async function in its "
                f"place, effects={{{name!r}: function}}"
            )
        effect.call.call = _as_call(stand_ins[name])
        if effect.unsure is not None:
            effect.unsure.call = _as_call(stand_ins.get(f"{name}.unsure", _not_given))
    yield


def _as_call(function: Function) -> Call:
    return lambda value, message, call: function(value, call)


async def _not_given(value: Any, call: Any) -> object:
    raise Misconfigured("effects=: no function for .unsure; give effects={'NAME.unsure': function}")
