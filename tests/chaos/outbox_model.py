"""A model of the outbox: why no sender has to be fenced.

A stream of three rows, two of them in one output partition. Two senders: each may crash, and the first may be paused and go
on as a zombie while the second one publishes. A record batch that was sent may arrive late, or never, and its answer may get
lost. Every state that can be reached is visited, breadth first.

The theorem: all senders publish the same immutable rows, from a watermark below which Kafka has everything, without a gap and
with one record batch in flight for each output partition. Then in every state

- Kafka has all rows below the watermark that the table has, and no row that was not committed;
- in each output partition, the *first* occurrences are in the order of their numbers. Proof: a sender that sends k for the
  first time has sent or found acknowledged all rows of that partition below k, and they were taken before.

So a late sender only repeats, and readers that know the ids see each row once, in order. What the model does not know: several
streams, refusals for good, and that ids are stable, which tests/chaos/second_stage.py judges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

PARTITION_OF = (0, 1, 0)
END = len(PARTITION_OF)


@dataclass(frozen=True)
class Rules:
    """What the relay does; each False is a mistake."""

    after_commit: bool = True  # a row is sent once its transaction has committed
    watermark_after_ack: bool = True
    contiguous: bool = True  # the watermark is the prefix without a gap, not the highest row
    one_in_flight: bool = True  # of each output partition
    begins_at_watermark: bool = True
    numbered_at_commit: bool = True  # under a lock that is held until COMMIT: no number appears before a lower one
    rows_stay: bool = True  # until they are acknowledged


class Sender(NamedTuple):
    """One sender.

    loaded: the next row to read. waiting, flying: by output partition. flying: batches without an answer yet.
    """

    is_up: bool = False
    watermark: int = 0
    acked: frozenset[int] = frozenset()
    loaded: int = 0
    waiting: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    flying: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = ((), ())


class State(NamedTuple):
    """A state of everything.

    kafka: by output partition, the first occurrences of rows. Repetitions change nothing, so they are not kept.
    """

    committed: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()
    watermark: int = 0
    kafka: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    late: frozenset[tuple[int, tuple[int, ...]]] = frozenset()  # batches of senders that are gone, still on their way
    senders: tuple[Sender, Sender] = (Sender(), Sender())
    crashes: int = 0
    faults: int = 0


class Bounds(NamedTuple):
    """How much may go wrong in one history."""

    crashes: int = 1
    faults: int = 1


def _put(pair: tuple[object, object], place: int, new: object) -> tuple[object, object]:
    return (new, pair[1]) if place == 0 else (pair[0], new)


def _sender(state: State, number: int, sender: Sender, **more: object) -> State:
    return state._replace(senders=_put(state.senders, number, sender), **more)  # type: ignore[arg-type]


def steps(state: State, rules: Rules, bounds: Bounds) -> Iterator[tuple[str, State]]:
    """Everything that may happen next, with its name."""
    for row in range(END):
        in_order = not rules.numbered_at_commit or row == len(state.committed)
        if row not in state.committed and in_order:
            yield f"row {row} commits", state._replace(committed=state.committed | {row})
    for partition, batch in state.late:
        late = state.late - {(partition, batch)}
        yield f"{batch} arrives late", _taken(state._replace(late=late), partition, batch)
    for number in (0, 1):
        yield from _work(state, number, rules, bounds)


def _taken(state: State, partition: int, batch: tuple[int, ...]) -> State:
    kafka = tuple(dict.fromkeys(state.kafka[partition] + batch))
    return state._replace(kafka=_put(state.kafka, partition, kafka))  # type: ignore[arg-type]


def _work(state: State, number: int, rules: Rules, bounds: Bounds) -> Iterator[tuple[str, State]]:
    sender = state.senders[number]
    name = f"sender {number}"
    if not sender.is_up:
        at = state.watermark if rules.begins_at_watermark else len(state.committed)
        yield f"{name} begins at {at}", _sender(state, number, Sender(True, at, frozenset(), at))
        return
    if state.crashes < bounds.crashes:
        flying = {(partition, batch) for partition in (0, 1) for batch in sender.flying[partition]}
        yield (
            f"{name} crashes",
            _sender(state, number, Sender(), late=state.late | flying, crashes=state.crashes + 1),
        )
    yield from _load(state, number, sender, rules)
    for partition in (0, 1):
        yield from _send(state, number, partition, rules)
        yield from _answers(state, number, partition, rules, bounds)
    if sender.watermark > state.watermark:
        yield f"{name} saves {sender.watermark}", state._replace(watermark=sender.watermark)


def _load(state: State, number: int, sender: Sender, rules: Rules) -> Iterator[tuple[str, State]]:
    """Read all rows that there are from the last one on."""
    if rules.after_commit:
        there = [row for row in range(sender.loaded, END) if row in state.committed]
    else:
        there = list(range(sender.loaded, END))
    if rules.numbered_at_commit and there != list(range(sender.loaded, sender.loaded + len(there))):
        return
    rows = [row for row in there if row not in state.removed]
    if not there:
        return
    first, second = (
        sender.waiting[partition] + tuple(row for row in rows if PARTITION_OF[row] == partition) for partition in (0, 1)
    )
    acked = (
        sender.acked if rules.numbered_at_commit else sender.acked | set(range(sender.loaded, there[-1])) - set(there)
    )
    loaded = sender._replace(loaded=there[-1] + 1, waiting=(first, second), acked=acked)
    removed = state.removed if rules.rows_stay else state.removed | set(rows)
    yield f"sender {number} loads {there}", _sender(state, number, loaded, removed=removed)


def _send(state: State, number: int, partition: int, rules: Rules) -> Iterator[tuple[str, State]]:
    sender = state.senders[number]
    waiting, flying = sender.waiting[partition], sender.flying[partition]
    if not waiting or len(flying) >= (1 if rules.one_in_flight else 2):
        return
    for size in sorted({1, len(waiting)}):
        batch, rest = waiting[:size], waiting[size:]
        sent = sender._replace(
            waiting=_put(sender.waiting, partition, rest),  # type: ignore[arg-type]
            flying=_put(sender.flying, partition, (*flying, batch)),  # type: ignore[arg-type]
        )
        if not rules.watermark_after_ack:
            sent = _acknowledge(sent, batch, rules)
        yield f"sender {number} sends {batch}", _sender(state, number, sent)


def _answers(state: State, number: int, partition: int, rules: Rules, bounds: Bounds) -> Iterator[tuple[str, State]]:
    """Answer a batch in flight.

    It is taken, taken without an answer, or not taken.
    """
    sender = state.senders[number]
    for place, batch in enumerate(sender.flying[partition]):
        rest = sender.flying[partition][:place] + sender.flying[partition][place + 1 :]
        landed = sender._replace(flying=_put(sender.flying, partition, rest))  # type: ignore[arg-type]
        again = landed._replace(waiting=_put(landed.waiting, partition, batch + landed.waiting[partition]))  # type: ignore[arg-type]
        taken = _taken(state, partition, batch)
        yield f"kafka takes {batch}", _sender(taken, number, _acknowledge(landed, batch, rules))
        if state.faults < bounds.faults:
            faults = state.faults + 1
            yield f"kafka takes {batch}, and the answer is lost", _sender(taken, number, again, faults=faults)
            yield f"kafka does not take {batch}", _sender(state, number, again, faults=faults)


def _acknowledge(sender: Sender, batch: tuple[int, ...], rules: Rules) -> Sender:
    acked = sender.acked | set(batch)
    watermark = sender.watermark
    if rules.contiguous:
        while watermark in acked:
            watermark += 1
    else:
        watermark = max(watermark, max(acked) + 1)
    return sender._replace(acked=frozenset(row for row in acked if row >= watermark), watermark=watermark)


def wrong(state: State) -> str:
    """What a state violates; "" for nothing."""
    there = {row for rows in state.kafka for row in rows}
    if not there <= state.committed:
        return "ghost"
    if not set(range(state.watermark)) <= there:
        return "lost"
    for rows in state.kafka:
        if list(rows) != sorted(rows):
            return "order"
    is_done = len(state.committed) == END
    idle = [s for s in state.senders if s.is_up and s.loaded == END and not any(s.waiting) and not any(s.flying)]
    return "lost" if is_done and idle and len(there) < END else ""


class Explored(NamedTuple):
    """The result.

    wrong, way: what the nearest wrong state violates, and the steps to it.
    """

    states: int
    wrong: str
    way: list[str]


ONE_OF_EACH = Bounds()


def explore(rules: Rules, bounds: Bounds = ONE_OF_EACH) -> Explored:
    """Visit every state; stop at the first wrong one."""
    first = State()
    came: dict[State, tuple[State, str] | None] = {first: None}
    todo = deque([first])
    while todo:
        state = todo.popleft()
        if what := wrong(state):
            way = []
            while (step := came[state]) is not None:
                state, name = step
                way.append(name)
            return Explored(len(came), what, way[::-1])
        for name, after in steps(state, rules, bounds):
            if after not in came:
                came[after] = (state, name)
                todo.append(after)
    return Explored(len(came), "", [])


BROKEN_RULES = {
    "a row is sent before its COMMIT": (Rules(after_commit=False), "ghost"),
    "the watermark moves before the acknowledgement": (Rules(watermark_after_ack=False), "lost"),
    "the watermark is the highest row": (Rules(contiguous=False), "lost"),
    "two batches in flight": (Rules(one_in_flight=False), "order"),
    "a sender begins at the end": (Rules(begins_at_watermark=False), "lost"),
    "numbers in another order than commits": (Rules(numbered_at_commit=False), "lost"),
    "rows are removed before they are sent": (Rules(rows_stay=False), "lost"),
}


if __name__ == "__main__":
    import time

    for name, rules in {"the real rules": Rules(), **{name: of for name, (of, _) in BROKEN_RULES.items()}}.items():
        begun = time.monotonic()
        result = explore(rules)
        print(name, result.states, result.wrong or "nothing wrong", f"{time.monotonic() - begun:.1f} s")
        for event in result.way:
            print("   ", event)
