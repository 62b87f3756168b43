"""The framework with broken batches: the oracle must find each fault.

docs/explanation/oracle.md lists them. A mutant replaces one function. Its docstring says what goes wrong then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from replacing import Replacement, replace_everywhere, undone_at_the_end

MUTANTS: dict[str, Callable[[], None]] = {}


def _mutant(patch: Callable[[], None]) -> Callable[[], None]:
    MUTANTS[patch.__name__.strip("_").replace("_", "-")] = patch
    return patch


def install(name: str) -> None:
    """Break the framework of this process in this way.

    "" leaves it alone.
    """
    if name:
        MUTANTS[name]()


@contextmanager
def broken(name: str) -> Iterator[list[Replacement]]:
    """Break the framework inside the block; yield what was replaced."""
    with undone_at_the_end() as replacements:
        install(name)
        yield replacements


@_mutant
def _grouping_without_proof() -> None:
    """All statements count as commuting.

    The first ones of a batch run before the second ones.
    """
    from consumer.deferred_writes import statement_order

    replace_everywhere(statement_order, "commute", lambda plans: True)


@_mutant
def _barriers_are_passed() -> None:
    """A statement that is not understood is taken to touch nothing."""
    from consumer.deferred_writes import statement_order

    original = statement_order.group

    def group(writes: Any, plans: Any) -> Any:
        known = [plan for plan in plans.values() if plan is not None]
        if not known:
            return original(writes, plans)
        import dataclasses

        nothing = dataclasses.replace(known[0], touches=frozenset({object()}), pins={})
        return original(writes, {sql: plan or nothing for sql, plan in plans.items()})

    replace_everywhere(statement_order, "group", group)


@_mutant
def _keys_as_python_compares_them() -> None:
    """Two spellings of one uuid are two keys."""
    from consumer.deferred_writes import rounds

    keys = dict.fromkeys(rounds._KEYS, lambda value: value)
    replace_everywhere(rounds, "_KEYS", keys)
    replace_everywhere(
        rounds, "_keys", lambda arguments, places, types: [tuple(argument[p] for p in places) for argument in arguments]
    )


@_mutant
def _blind_to_the_catalog() -> None:
    """Triggers, rules, policies, generated columns and foreign keys are not looked at."""
    from consumer.deferred_writes import catalog

    replace_everywhere(catalog, "barrier", lambda facts, shape: None)
    replace_everywhere(catalog, "_why_alone", lambda facts, shape, types: None)


@_mutant
def _rows_met_twice() -> None:
    """An array meets a row twice, and changes it once."""
    from consumer.deferred_writes import rounds

    replace_everywhere(rounds, "split_by_key_use", lambda arguments, shape, types: [list(arguments)])
    replace_everywhere(rounds, "sum_by_key", lambda arguments, shape, types: None)


@_mutant
def _sums_beyond_the_keys() -> None:
    """The last of several additions to a row replaces their sum."""
    from consumer.deferred_writes import rounds

    original = rounds.sum_by_key

    def sums(arguments: Any, shape: Any, types: Any) -> Any:
        summed = original(arguments, shape, types)
        if summed is None:
            return None
        places = [place for _, place in shape.keys]
        last = {tuple(str(argument[place]) for place in places): argument for argument in arguments}
        return [last[tuple(str(row[place]) for place in places)] for row in summed[0]], summed[1]

    replace_everywhere(rounds, "sum_by_key", sums)


@_mutant
def _no_turns() -> None:
    """Messages of a handler with concurrency use the connection at once.

    What one reads, another changes.
    """
    from consumer.transaction.scope import Turn

    async def take(self: Any, tx: Any) -> None: ...

    replace_everywhere(Turn, "take", take)


@_mutant
def _awaited_before_deferred() -> None:
    """An awaited statement does not send what was deferred before it."""
    from consumer.transaction.tx import Tx

    async def flush(self: Any, level: Any) -> None: ...

    replace_everywhere(Tx, "_flush", flush)


@_mutant
def _constraints_at_the_end() -> None:
    """Deferred constraints are checked once, at the COMMIT of the whole batch."""
    from consumer.deferred_writes.writer import BulkWriter

    async def none(self: Any) -> list[str]:
        return []

    replace_everywhere(BulkWriter, "deferred_constraints", none)


@_mutant
def _schema_known_for_a_minute() -> None:
    """What a handler's own DDL changes is noticed a minute later."""
    from consumer.deferred_writes.writer import BulkWriter

    replace_everywhere(BulkWriter, "forget", lambda self: None)


@_mutant
def _failures_leave_their_writes() -> None:
    """What a failed message has written is not taken back."""
    from consumer.core import outcome  # noqa: F401 - loads the package
    from consumer.postgres.session import Session

    original = Session.begin

    async def begin(self: Any) -> None:
        await original(self)
        execute = self.connection.execute

        class Deaf:
            def __getattr__(self, name: str) -> Any:
                return getattr(execute.__self__, name)

            async def execute(self, sql: str, *args: Any, **options: Any) -> Any:
                if sql.startswith("rollback to savepoint consumer_"):
                    sql = sql.replace("rollback to", "release") + f"; {sql.replace('rollback to ', '')}"
                return await execute(sql, *args, **options)

        if type(self.connection).__name__ != "Deaf":
            self.connection = Deaf()

    replace_everywhere(Session, "begin", begin)


@_mutant
def _settings_stay() -> None:
    """What `set_local` sets stays for the messages that follow."""
    from consumer.transaction import tx

    replace_everywhere(tx, "_RESET_LOCAL", "select $1::text[], $2::text[]")


@_mutant
def _handler_after_handler() -> None:
    """All messages of the first handler run before the second handler's."""
    from consumer.transaction.handler_runner import HandlerRunner

    original = HandlerRunner.run

    async def run(self: Any, won: Any) -> None:
        numbers = [delivery.handler.number for delivery in won]
        ordered = sorted(won, key=lambda delivery: numbers.index(delivery.handler.number))
        await original(self, ordered)

    replace_everywhere(HandlerRunner, "run", run)


@_mutant
def _errors_are_swallowed() -> None:
    """An error of a deferred write in a savepoint is ignored.

    The write is left out, and the message counts as applied.
    """
    from consumer.deferred_writes.writer import BulkWriter

    original = BulkWriter.send

    async def send(self: Any, sql: str, arguments: Any) -> None:
        await self._connection.execute("savepoint oracle")
        try:
            await original(self, sql, arguments)
        except Exception:
            await self._connection.execute("rollback to savepoint oracle")

    replace_everywhere(BulkWriter, "send", send)


@_mutant
def _undone_savepoints_publish() -> None:
    """What was published in a savepoint that is undone is published."""
    from consumer.transaction import tx

    original = tx.Tx.publish

    def publish(self: Any, *arguments: Any, **options: Any) -> None:
        token = tx._inside.set(None)  # as if it was called outside of any savepoint
        try:
            original(self, *arguments, **options)
        finally:
            tx._inside.reset(token)

    replace_everywhere(tx.Tx, "publish", publish)


@_mutant
def _published_in_the_order_of_ids() -> None:
    """Records of a transaction are sorted by their ids."""
    from consumer.transaction import publishing

    original = publishing.in_message_order

    def sorted_by_id(publishers: Any, applied: Any) -> Any:
        return sorted(original(publishers, applied), key=lambda outgoing: outgoing.record.id)

    replace_everywhere(publishing, "in_message_order", sorted_by_id)
