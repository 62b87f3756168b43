"""Runs a case on both sides and compares what they leave.

Tables, sequences, and the outcome of every message. The serial side runs in the order of the batches. With
`concurrency=` above 1 any order that keeps that of each key is right: some likely ones are tried, and all if there are
few.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias
from uuid import UUID

import asyncpg

from consumer.core.identity import message_id
from oracle import framework, serial
from oracle.case import Case, Difference
from oracle.databases import Databases, Rows, State
from oracle.framework import Place, Seen
from oracle.serial import Published

Row: TypeAlias = tuple[str, int, str, str, str | None, str]  # topic, input partition, handler, id, key, value

_SEARCHED_MAX = 5  # calls of which every order is tried


@dataclass
class Verdict:
    """The result of a case.

    difference: what is wrong. refused: messages that the framework refused with a reason.
    """

    difference: Difference | None = None
    seen: Seen | None = None
    refused: int = 0
    failed: int = 0
    undecided: bool = False
    invalid: str = ""  # the schema cannot be made: the case says nothing


async def check(databases: Databases, case: Case) -> Verdict:
    """Compare the two sides on one case."""
    try:
        await databases.reset(case)
    except asyncpg.PostgresError as error:
        return Verdict(invalid=str(error))
    try:
        seen = await framework.settle(databases.framework, case)
    except TimeoutError:
        return Verdict(Difference("hang", "the batch was not settled in time"))
    except asyncpg.PostgresConnectionError:
        raise
    except Exception as error:
        return Verdict(Difference("crash", f"{type(error).__name__}: {error}"))
    verdict = Verdict(seen=seen)
    verdict.refused = sum(_is_refused(place) for place in seen.places.values())
    verdict.failed = sum(place.outcome != "applied" for place in seen.places.values())
    ours = await databases.state(databases.framework)
    called = [
        place
        for place, sighting in seen.places.items()
        if sighting.calls and not _is_refused(sighting) and not _waits_behind(sighting)
    ]
    # A batch handler takes messages together, so their order beside those of other handlers is free, too.
    several = len(case.handlers) > 1
    is_free = any(handler.concurrency > 1 or (several and handler.batch is not None) for handler in case.handlers)
    if wrong := _not_called(case, seen):
        verdict.difference = wrong
        return verdict
    is_exact = all(place.calls <= 1 and place.outcome == "applied" for place in seen.places.values() if place.calls)
    difference = None
    for order in _orders(case, seen, called) if is_free else [_by_batch(seen, called)]:
        difference = await _compare(databases, case, seen, order, ours, is_exact)
        if difference is None:
            return verdict
    verdict.undecided = is_free and len(called) > _SEARCHED_MAX
    verdict.difference = None if verdict.undecided else difference
    return verdict


async def _compare(
    databases: Databases, case: Case, seen: Seen, order: Sequence[Place], ours: State, is_exact: bool
) -> Difference | None:
    """Run the messages serially in this order; return the first difference."""
    working = {
        place[0] for place, sighting in seen.places.items() if sighting.outcome == "applied"
    }  # handlers not all of whose messages fail
    published: dict[Place, list[Published]] = {}
    await databases.reset_serial(case)
    async with databases.serial_connection() as connection:
        for place in order:
            handler, message = place
            async with asyncio.timeout(60):
                error = await serial.apply(
                    connection, case.handlers[handler], case.messages[message], published.setdefault(place, [])
                )
            sighting = seen.places[place]
            if (error is None) != (sighting.outcome == "applied"):
                went = "succeeds" if error is None else f"fails with {type(error).__name__}: {error}"
                text = f"message {message} at handler {handler} is {sighting.outcome} ({sighting.cause}: {sighting.error}) in the batch; alone it {went}"
                return Difference("outcome", text)
            if error is not None and sighting.outcome == "waiting" and not _may_wait(error) and handler in working:
                return Difference("outcome", f"message {message} waits for ever ({sighting.error}); alone: {error}")
    theirs = await databases.state(databases.serial)
    return _difference(case, ours, theirs, is_exact) or _outgoing_difference(
        case, seen, await databases.published(seen.app), published
    )


def _outgoing_difference(
    case: Case, seen: Seen, ours: Sequence[Row], published: Mapping[Place, list[Published]]
) -> Difference | None:
    """Return the first stream with other records than the messages publish alone.

    In the order of the batches. A batch handler's records come at the place of the first message of its call, so each handler has an order of its own.
    """
    mine: dict[tuple[str, int, str], list[tuple[str, str | None, str]]] = defaultdict(list)
    for topic, partition, handler, id, key, value in ours:
        mine[topic, partition, handler].append((id, key, " ".join(json.loads(value))))
    theirs: dict[tuple[str, int, str], list[tuple[str, str | None, str]]] = defaultdict(list)
    for place in _by_batch(seen, list(published)):
        message = case.messages[place[1]]
        for topic, ordinal, key, value in published[place]:
            id = derived_id(seen.app, f"h{place[0]}", f"m{message.id}", ordinal)
            theirs[topic, message.partition, f"h{place[0]}"].append((id, key, " ".join(json.loads(value))))
    for stream in sorted({*mine, *theirs}):
        if mine[stream] != theirs[stream]:
            extra = [f"batch only:      {row}" for row in mine[stream] if row not in theirs[stream]][:5]
            extra += [f"one by one only: {row}" for row in theirs[stream] if row not in mine[stream]][:5]
            return Difference("published", f"what {stream} publishes differs", extra or ["in its order"])
    return None


def derived_id(app: str, handler: str, input_id: str, ordinal: int) -> str:
    """Return the id that docs/how-to/publish.md promises.

    Written again here, so as not to ask the code under test.
    """
    fields = (app.encode(), handler.encode(), message_id(input_id.encode()), str(ordinal).encode())
    raw = b"".join(str(len(field)).encode() + b":" + field for field in fields)
    return str(UUID(bytes=blake2b(raw, digest_size=16, person=b"outbox").digest()))


def _may_wait(error: Exception) -> bool:
    """Whether a message that fails like this may be kept waiting.

    As far as one can see, schema or rights do not fit the code.
    """
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "")[:2] not in ("21", "22", "23", "P0")


def _is_refused(sighting: framework.Sighting) -> bool:
    """Whether the framework refused what the handler does, and said so.

    Then the message must have left nothing.
    """
    return sighting.outcome != "applied" and type(sighting.exception).__name__ == "TransactionMisuse"


def _waits_behind(sighting: framework.Sighting) -> bool:
    """Whether its calls were undone because of an earlier message.

    One of its key that has failed in the end.
    """
    return sighting.outcome != "applied" and (sighting.cause == "behind" or sighting.error.startswith("waits behind"))


def _by_start(seen: Seen, called: Sequence[Place]) -> list[Place]:
    return sorted(called, key=lambda place: seen.places[place].began)


def _by_batch(seen: Seen, called: Sequence[Place]) -> list[Place]:
    wanted = set(called)
    return [place for place in _settled_order(seen) if place in wanted]


def _settled_order(seen: Seen) -> list[Place]:
    """The deliveries by the last batch that each was in.

    One that failed and was retried ran then.
    """
    taken = [place for batch in seen.batches for place in batch]
    return list(dict.fromkeys(reversed(taken)))[::-1]


def _not_called(case: Case, seen: Seen) -> Difference | None:
    """A message whose handler was not called without a reason.

    A reason would be among the messages before it.
    """
    settled: dict[tuple[int, int], list[int | None]] = {}  # handler and id -> payloads, the one that counts first
    stopped: dict[tuple[int, int, str | None], bool] = {}  # and whether by one that waits
    taken = [place for batch in seen.batches for place in batch]
    # By its first batch: there its place among the others is decided.
    for place in dict.fromkeys([*taken, *seen.places]):
        handler, number = place
        message, sighting = case.messages[number], seen.places[place]
        key = (handler, message.id)
        options = case.handlers[handler]
        unit = (handler, message.partition, message.key if options.order == "key" else "")
        is_ordered = options.order == "partition" or (options.order == "key" and message.key is not None)
        if sighting.outcome == "not delivered" and stopped.get(unit):
            continue
        if sighting.outcome in ("not delivered", "crashed"):
            return Difference("outcome", f"message {number} at handler {handler} was not delivered")
        if key in settled:
            first, *others = settled[key]
            wanted = ["duplicate"] if message.payload == first else ["id_conflict"]
            wanted += ["duplicate"] if message.payload in others else []  # of that conflict
            word = sighting.cause if sighting.outcome == "dead-lettered" else sighting.outcome
            # Behind a dead letter of its key, an id that was used before may also be reported as a conflict.
            if word not in wanted and not (is_ordered and unit in stopped):
                text = f"message {number} at handler {handler} is {sighting.outcome}, not {' or '.join(wanted)}"
                return Difference("outcome", text)
            settled[key].append(message.payload)
            continue
        settled[key] = [message.payload]
        if is_ordered and unit in stopped:
            if sighting.outcome == "applied":
                return Difference("outcome", f"message {number} is applied, behind a failed message of its key")
        elif not sighting.calls and not (is_ordered and _is_behind(case, seen, place)):
            return Difference(
                "outcome", f"message {number} is {sighting.outcome} ({sighting.cause}), and was never tried"
            )
        elif sighting.outcome == "waiting" or (sighting.outcome == "dead-lettered" and sighting.cause == "failed"):
            stopped[unit] = sighting.outcome == "waiting"
    return None


def _is_behind(case: Case, seen: Seen, place: Place) -> bool:
    """Whether an earlier message of the same unit blocks it.

    That one waits or is a dead letter, in whichever batch it was tried last.
    """
    handler, number = place
    message = case.messages[number]
    for (other, before), sighting in seen.places.items():
        earlier = case.messages[before]
        same_unit = earlier.partition == message.partition and (
            case.handlers[handler].order == "partition" or earlier.key == message.key
        )
        if other == handler and before < number and same_unit and sighting.outcome in ("waiting", "dead-lettered"):
            return True
    return False


def _orders(case: Case, seen: Seen, called: Sequence[Place]) -> Iterator[list[Place]]:
    """Orders that keep that of each key.

    The likely ones first, then, of few messages, all.
    """
    likely = [
        _by_start(seen, called),
        sorted(called, key=lambda place: max(seen.places[place].ended, seen.places[place].began)),
        _by_batch(seen, called),
    ]
    tried: list[list[Place]] = []
    for order in likely:
        if order not in tried and _keeps_keys(case, seen, order):
            tried.append(order)
            yield order
    if len(called) > _SEARCHED_MAX:
        return
    for permuted in itertools.permutations(called):
        if list(permuted) not in tried and _keeps_keys(case, seen, permuted):
            yield list(permuted)


def _keeps_keys(case: Case, seen: Seen, order: Sequence[Place]) -> bool:
    placed = {place: n for n, place in enumerate(place for batch in seen.batches for place in batch)}
    batch_of = {place: n for n, batch in enumerate(seen.batches) for place in batch}
    last: dict[object, int] = {}
    latest = 0
    for place in order:
        if batch_of[place] < latest:
            return False
        latest = batch_of[place]
        message, handler = case.messages[place[1]], case.handlers[place[0]]
        if handler.batch is not None:
            unit: object = place[0]
        elif handler.concurrency == 1:
            unit = None  # those of all such handlers in the order of the batch
        elif message.key is None:
            continue
        else:
            unit = (place[0], message.partition, message.key)
        if placed[place] < last.get(unit, -1):
            return False
        last[unit] = placed[place]
    return True


def _difference(case: Case, ours: State, theirs: State, is_exact: bool) -> Difference | None:
    """The first table that differs.

    Values of a sequence are compared by rank where statements were run again.
    """
    if not is_exact:
        ours, theirs = _ranked(ours), _ranked(theirs)
    for name in sorted({*ours.tables, *theirs.tables}):
        mine, other = ours.tables.get(name), theirs.tables.get(name)
        if mine is None or other is None:
            return Difference("table", f"{name} is there on one side only")
        if mine.columns != other.columns:
            return Difference("table", f"{name} has columns {mine.columns} in the batch, {other.columns} one by one")
        rows, wanted = Counter(mine.rows), Counter(other.rows)
        if rows != wanted:
            details = [f"batch only:      {row}" for row in list((rows - wanted).elements())[:5]]
            details += [f"one by one only: {row}" for row in list((wanted - rows).elements())[:5]]
            return Difference("table", f"{name} ({', '.join(mine.columns)}) differs", details)
    if is_exact and ours.sequences != theirs.sequences:
        return Difference("table", f"sequences are {ours.sequences} in the batch, {theirs.sequences} one by one")
    return None


def _ranked(state: State) -> State:
    """The state with the values of a sequence replaced by ranks.

    The rank of a value among all of that sequence.
    """
    values: dict[str, set[int]] = {}
    for rows in state.tables.values():
        for place, column in enumerate(rows.columns):
            if domain := _domain(column):
                values.setdefault(domain, set()).update(
                    int(value) for row in rows.rows if (value := row[place]) is not None
                )
    ranks = {
        domain: {value: n for n, value in enumerate(sorted(values_of_domain))}
        for domain, values_of_domain in values.items()
    }
    tables = {}
    for name, rows in state.tables.items():
        domains = [_domain(column) for column in rows.columns]
        tables[name] = Rows(
            rows.columns,
            [
                tuple(
                    f"#{ranks[domain][int(value)]}" if domain and value is not None else value
                    for domain, value in zip(domains, row, strict=True)
                )
                for row in rows.rows
            ],
        )
    return State(tables, {})


def _domain(column: str) -> str:
    return column[:4] if column[:3] in ("sid", "nid") and column[3:4].isdigit() else ""
