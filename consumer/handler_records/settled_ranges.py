"""Decides which offsets each handler has settled, from recorded ranges.

Positions are per application: what is below a position was settled by the handlers that its worker had, not by those
that were added later or that other workers have. A range is open while its handler settles up to the position.
Limitations: a handler with `idempotent=False` keeps no ledger row, so no range either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from consumer.core.message import Partition


class SettledRange(NamedTuple):
    """Offsets that a handler has settled, or need not settle.

    past: the offset after the last one; None: up to the position.
    """

    first: int
    past: int | None


class At(NamedTuple):
    """A position, and the handlers that settle from there on.

    first: where the application began. next: the next offset to settle. handlers: their numbers.
    """

    first: int | None
    next: int
    handlers: frozenset[int] | None  # None: a version that did not record it


class HandlerChange(NamedTuple):
    """A handler that begins or ends at an offset."""

    partition: Partition
    handler: int
    offset: int


class HandlerChanges(NamedTuple):
    """What a worker with other handlers than the one before changes.

    late: those that begin behind the application. names: of all handlers of the application, by number.
    """

    begun: tuple[HandlerChange, ...] = ()
    ended: tuple[HandlerChange, ...] = ()
    late: tuple[HandlerChange, ...] = ()
    names: Mapping[int, str] = {}


class Gap(NamedTuple):
    """Offsets below the position that a handler has not settled.

    From `first` to `past` - 1.
    """

    handler: str
    partition: Partition
    first: int
    past: int


class Rename(NamedTuple):
    """A handler that was probably renamed.

    It lacks what a handler of the same topic, which the App no longer has, has settled.
    """

    old: str
    new: str
    topic: str


class Known(NamedTuple):
    """A handler as the ledger knows it."""

    number: int
    topics: frozenset[str]
    legacy: bool  # registered by a version that recorded no ranges


class Assessment(NamedTuple):
    """What the App's handlers have missed, and signs of another App version.

    absent: handlers that the App lacks and that still settle messages.
    """

    gaps: tuple[Gap, ...] = ()
    renames: tuple[Rename, ...] = ()
    absent: tuple[str, ...] = ()


def as_text(numbers: Iterable[int]) -> str:
    """Handlers as a position names them."""
    return ",".join(map(str, sorted(numbers)))


def as_numbers(text: str | None) -> frozenset[int] | None:
    """The reverse of `as_text`."""
    return None if text is None else frozenset(int(number) for number in text.split(",") if number)


def changes(
    positions: Mapping[Partition, At], wanted: Mapping[Partition, frozenset[int]], legacy: Collection[int]
) -> HandlerChanges:
    """Return which handlers begin and end when a worker takes over.

    found: the positions. wanted: the numbers of the worker's handlers.
    """
    begun, ended, late = [], [], []
    for partition, at in sorted(positions.items()):
        before = at.handlers if at.handlers is not None else frozenset()
        for handler in sorted(wanted[partition] - before):
            is_old = at.handlers is None and handler in legacy
            begun.append(HandlerChange(partition, handler, (at.first or 0) if is_old else at.next))
            if not is_old and at.next > (at.first or 0):
                late.append(begun[-1])
        ended += [HandlerChange(partition, handler, at.next) for handler in sorted(before - wanted[partition])]
    return HandlerChanges(tuple(begun), tuple(ended), tuple(late))


def missed(first: int, position: int, ranges: Iterable[SettledRange]) -> list[tuple[int, int]]:
    """The parts of [first, position) that no range covers."""
    gaps, at = [], first
    for settled in sorted(ranges, key=lambda recorded: recorded.first):
        if at < settled.first and at < position:
            gaps.append((at, min(settled.first, position)))
        at = max(at, position if settled.past is None else settled.past)
    if at < position:
        gaps.append((at, position))
    return gaps


def assess(
    code: Mapping[str, Collection[str]],
    known: Mapping[str, Known],
    positions: Mapping[Partition, At],
    ranges: Mapping[tuple[int, Partition], Sequence[SettledRange]],
) -> Assessment:
    """Compare the App's handlers with what the ledger has recorded.

    code: name -> topics of the handlers that keep ledger rows.
    """
    gaps = []
    for name, topics in sorted(code.items()):
        handler = known.get(name)
        for partition, at in sorted(positions.items()):
            if partition.topic in topics:
                gaps += [Gap(name, partition, *offsets) for offsets in _missed_by(handler, partition, at, ranges)]
    missing: dict[str, list[Gap]] = {}
    for gap in gaps:
        missing.setdefault(gap.handler, []).append(gap)
    gone = {name: handler for name, handler in known.items() if name not in code}
    renames = [
        Rename(old, new, topic)
        for new, of_new in sorted(missing.items())
        for old, handler in sorted(gone.items())
        if _may_have_settled(handler, of_new, ranges)
        for topic in sorted(handler.topics & set(code[new]))[:1]
    ]
    settling = {number for at in positions.values() for number in at.handlers or ()}
    absent = [name for name, handler in sorted(gone.items()) if handler.number in settling]
    return Assessment(tuple(gaps), tuple(renames), tuple(absent))


def _may_have_settled(
    handler: Known, gaps: Iterable[Gap], ranges: Mapping[tuple[int, Partition], Sequence[SettledRange]]
) -> bool:
    """Whether a handler has settled anything of the gaps.

    A handler that was renamed has.
    """
    return handler.legacy or any(
        own.first < gap.past and (own.past is None or own.past > gap.first)
        for gap in gaps
        for own in ranges.get((handler.number, gap.partition), ())
    )


def _missed_by(
    handler: Known | None,
    partition: Partition,
    at: At,
    ranges: Mapping[tuple[int, Partition], Sequence[SettledRange]],
) -> list[tuple[int, int]]:
    own = list(ranges.get((handler.number, partition), ())) if handler is not None else []
    if at.handlers is None and handler is not None and handler.legacy:
        return []
    return missed(at.first or 0, at.next, own)
