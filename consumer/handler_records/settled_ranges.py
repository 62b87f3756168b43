"""Decides which offsets each handler has settled, from recorded ranges.

Positions are per application: what is below a position was settled by the handlers that its worker had, not by those
that were added later or that other workers have. A range is open while its handler settles up to the position.
Limitations: a handler with `idempotent=False` keeps no ledger row, so no range either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from consumer.core.message import Partition


class Stretch(NamedTuple):
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


class Change(NamedTuple):
    """A handler that begins or ends at an offset."""

    partition: Partition
    handler: int
    offset: int


class Changes(NamedTuple):
    """What a worker with other handlers than the one before changes.

    late: those that begin behind the application. names: of all handlers of the application, by number.
    """

    begun: tuple[Change, ...] = ()
    ended: tuple[Change, ...] = ()
    late: tuple[Change, ...] = ()
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
    legacy: bool  # registered by a version that recorded no stretches


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
    return None if text is None else frozenset(int(each) for each in text.split(",") if each)


def changes(
    found: Mapping[Partition, At], wanted: Mapping[Partition, frozenset[int]], legacy: Collection[int]
) -> Changes:
    """Return which handlers begin and end when a worker takes over.

    found: the positions. wanted: the numbers of the worker's handlers.
    """
    begun, ended, late = [], [], []
    for partition, at in sorted(found.items()):
        before = at.handlers if at.handlers is not None else frozenset()
        for handler in sorted(wanted[partition] - before):
            is_old = at.handlers is None and handler in legacy
            begun.append(Change(partition, handler, (at.first or 0) if is_old else at.next))
            if not is_old and at.next > (at.first or 0):
                late.append(begun[-1])
        ended += [Change(partition, each, at.next) for each in sorted(before - wanted[partition])]
    return Changes(tuple(begun), tuple(ended), tuple(late))


def missed(first: int, position: int, stretches: Iterable[Stretch]) -> list[tuple[int, int]]:
    """The parts of [first, position) that no stretch covers."""
    found, at = [], first
    for each in sorted(stretches, key=lambda each: each.first):
        if at < each.first and at < position:
            found.append((at, min(each.first, position)))
        at = max(at, position if each.past is None else each.past)
    if at < position:
        found.append((at, position))
    return found


def assess(
    code: Mapping[str, Collection[str]],
    known: Mapping[str, Known],
    positions: Mapping[Partition, At],
    stretches: Mapping[tuple[int, Partition], Sequence[Stretch]],
) -> Assessment:
    """Compare the App's handlers with what the ledger has recorded.

    code: name -> topics of the handlers that keep ledger rows.
    """
    gaps = []
    for name, topics in sorted(code.items()):
        handler = known.get(name)
        for partition, at in sorted(positions.items()):
            if partition.topic in topics:
                gaps += [Gap(name, partition, *each) for each in _missed_by(handler, partition, at, stretches)]
    missing: dict[str, list[Gap]] = {}
    for each in gaps:
        missing.setdefault(each.handler, []).append(each)
    gone = {name: each for name, each in known.items() if name not in code}
    renames = [
        Rename(old, new, topic)
        for new, of_new in sorted(missing.items())
        for old, each in sorted(gone.items())
        if _may_have_settled(each, of_new, stretches)
        for topic in sorted(each.topics & set(code[new]))[:1]
    ]
    settling = {number for at in positions.values() for number in at.handlers or ()}
    absent = [name for name, each in sorted(gone.items()) if each.number in settling]
    return Assessment(tuple(gaps), tuple(renames), tuple(absent))


def _may_have_settled(
    handler: Known, gaps: Iterable[Gap], stretches: Mapping[tuple[int, Partition], Sequence[Stretch]]
) -> bool:
    """Whether a handler has settled anything of the gaps.

    A handler that was renamed has.
    """
    return handler.legacy or any(
        own.first < gap.past and (own.past is None or own.past > gap.first)
        for gap in gaps
        for own in stretches.get((handler.number, gap.partition), ())
    )


def _missed_by(
    handler: Known | None,
    partition: Partition,
    at: At,
    stretches: Mapping[tuple[int, Partition], Sequence[Stretch]],
) -> list[tuple[int, int]]:
    own = list(stretches.get((handler.number, partition), ())) if handler is not None else []
    if at.handlers is None and handler is not None and handler.legacy:
        return []
    return missed(at.first or 0, at.next, own)
