"""Records which offsets each handler has settled, and renames handlers. handler_records/settled_ranges.py decides.

A position names the handlers that settle from it on, and moves only for a worker that has exactly these. A worker with
others ends and begins ranges at the position when it opens the partition: per assignment, never per batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.handler_records.settled_ranges import (
    Assessment,
    At,
    Gap,
    HandlerChanges,
    Known,
    SettledRange,
    as_numbers,
    assess,
    changes,
)
from consumer.postgres import claims, dead_letters, generations, handler_history, handlers, positions, server
from consumer.postgres.claim_sql import ADVISORY_CLASS
from consumer.postgres.protocol import Connection


class HandlerCoverage(NamedTuple):
    """What the ledger records of an application's handlers."""

    known: Mapping[str, Known]
    positions: Mapping[Partition, At]
    ranges: Mapping[tuple[int, Partition], list[SettledRange]]
    declared: Mapping[tuple[int, Partition], list[SettledRange]]  # that a handler need not settle
    began_with_group: Mapping[Partition, int]  # where the application began at another client's commit

    def assess(self, app: App) -> Assessment:
        """What the App's handlers have missed."""
        app.discover(partition.topic for partition in self.positions)
        return assess(topics_of(app), self.known, self.positions, self.ranges)


def topics_of(app: App) -> dict[str, tuple[str, ...]]:
    """The topics of the handlers that keep ledger rows."""
    return {handler.name: tuple(handler.topics) for handler in app.handlers.values() if handler.idempotent}


async def register(connection: Connection, app: App) -> None:
    """Record the topics of the App's handlers, to recognize renamed ones."""
    await handler_history.record_topics(connection, app.name, topics_of(app))


async def switch(connection: Connection, app: str, wanted: Mapping[Partition, str]) -> HandlerChanges:
    """Name other handlers in positions, and begin and end their ranges."""
    partitions = sorted(wanted)
    async with connection.transaction():
        locked = await positions.lock_settling(connection, app, partitions)
        registered = await handler_history.registered(connection, app)
        numbers = {partition: as_numbers(text) or frozenset() for partition, text in wanted.items()}
        legacy = {handler.number for handler in registered.values() if handler.legacy}
        done = changes(_at(locked), numbers, legacy)
        await handler_history.end_coverage(connection, done.ended)
        await handler_history.begin_coverage(connection, done.begun)
        await positions.set_handlers(connection, app, {partition: wanted[partition] for partition in locked})
    return done._replace(names={handler.number: name for name, handler in registered.items()})


def _at(settling: Mapping[Partition, positions.Settling]) -> dict[Partition, At]:
    return {partition: At(row.first, row.next, as_numbers(row.handlers)) for partition, row in settling.items()}


async def cover(connection: Connection, handler: int, ranges: Iterable[tuple[Partition, int, int]], why: str) -> None:
    """Record ranges that a handler has settled or need not settle.

    why: "replayed" or "declared".
    """
    filled = [(partition, first, past) for partition, first, past in ranges if first < past]
    await handler_history.cover(connection, handler, filled, why)


async def read_coverage(connection: Connection, app: str) -> HandlerCoverage:
    """Read what is recorded."""
    registered = await handler_history.registered(connection, app)
    settling = await positions.settling(connection, app)
    ranges: dict[tuple[int, Partition], list[SettledRange]] = {}
    declared: dict[tuple[int, Partition], list[SettledRange]] = {}
    for covered in await handler_history.coverage(connection, app):
        settled = SettledRange(covered.first, covered.past)
        ranges.setdefault((covered.handler, covered.partition), []).append(settled)
        if covered.why == "declared":
            declared.setdefault((covered.handler, covered.partition), []).append(settled)
    return HandlerCoverage(
        {
            name: Known(handler.number, frozenset(handler.topics), handler.legacy)
            for name, handler in registered.items()
        },
        _at(settling),
        ranges,
        declared,
        {
            partition: row.first
            for partition, row in settling.items()
            if row.began_with == "group" and row.first is not None
        },
    )


async def begin_here(connection: Connection, app: App, handler: str, topic: str | None) -> list[Gap]:
    """Declare that a handler need not settle what it has missed.

    topic: None for all. Returns the gaps that this ends. Raises Misconfigured if the ledger does not know the handler.
    """
    async with connection.transaction():
        await positions.lock_app(connection, app.name)
        recorded = await read_coverage(connection, app.name)
        if handler not in recorded.known:
            raise Misconfigured(f"handler {handler!r}: no worker has run with it yet; start one, then run this again")
        missed = [gap for gap in recorded.assess(app).gaps if gap.handler == handler]
        gaps = [gap for gap in missed if topic is None or gap.partition.topic == topic]
        number = recorded.known[handler].number
        await cover(connection, number, [(gap.partition, gap.first, gap.past) for gap in gaps], "declared")
    return gaps


async def rename(connection: Connection, app: str, old: str, new: str, operator: str) -> None:
    """Rename a handler and keep its rows.

    Waits for the batches in flight; running workers reconnect. Raises Misconfigured, and then changes nothing.
    """
    async with connection.transaction():
        # invariant: no generation changes and no claim runs meanwhile; later claims see the new epoch.
        version = await generations.lock_version(connection)
        await connection.execute("select pg_advisory_xact_lock($1, $2)", ADVISORY_CLASS, version)
        numbers = await handlers.lock_numbers(connection, app)
        if old not in numbers:
            known = ", ".join(sorted(numbers)) or "none"
            raise Misconfigured(f"--rename-handler: App {app!r} has no handler {old!r} in the ledger; it has: {known}")
        if new in numbers:
            await _forget_empty(connection, app, new, numbers[new])
        await handlers.rename(connection, app, numbers[old], old, new, operator)
        await server.begin_epoch(connection)


async def _forget_empty(connection: Connection, app: str, name: str, number: int) -> None:
    """Remove a handler that has settled nothing. Raises Misconfigured where it has."""
    if await claims.exist(connection, number) or await dead_letters.exist(connection, number):
        raise Misconfigured(
            f"--rename-handler: handler {name!r} of App {app!r} has rows of its own already, so both are kept as they are; "
            f"record where it begins with `consumer positions APP --handler {name} --begin-here`"
        )
    await handler_history.forget_handler(connection, number)
    await positions.forget_counts(connection, number)
    await dead_letters.forget_attempts_of(connection, number)
    await handlers.remove(connection, number)
