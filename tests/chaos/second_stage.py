"""Judges the second stage by the first one's input.

Pure. The ids of published records are derived here once more, from the description in docs/how-to/publish.md. What is applied of
the first application is what `book` has in its effects, which invariants.py has judged by the log.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple
from uuid import UUID

from chaos.invariants import Edit, Effect, LogEntry, Violations

_EXAMPLES_MAX = 5


class Published(NamedTuple):
    """A record of the output topic. body: source, n, key and amount."""

    partition: int
    offset: int
    id: str
    body: tuple[str, int, str, int]


class Received(NamedTuple):
    """A row that the next application wrote."""

    id: str
    body: tuple[str, int, str, int]
    partition: int
    offset: int


@dataclass
class SecondStage:
    """What there is.

    app: the first application. received: None where there is no second application.
    """

    app: str
    log: Sequence[LogEntry]
    effects: Sequence[Effect]
    edits: Sequence[Edit]
    published: Sequence[Published]
    received: Sequence[Received] | None = None
    balances: dict[str, int] = field(default_factory=dict)
    letters: Sequence[str] = ()  # ids
    stopped: Sequence[str] = ()  # reasons of streams


def derived_id(app: str, handler: str, source: str, n: int) -> str:
    """Return the id of the n-th record published for an input."""
    fields = (app.encode(), handler.encode(), UUID(source).bytes, str(n).encode())
    raw = b"".join(str(len(field)).encode() + b":" + field for field in fields)
    return str(UUID(bytes=blake2b(raw, digest_size=16, person=b"outbox").digest()))


class _Expected:
    """What `book` publishes for its effects.

    either: ids that came with several payloads, any of which may have been first.
    """

    def __init__(self, stage: SecondStage) -> None:
        at = {(entry.topic, entry.partition, entry.offset): entry for entry in stage.log}
        edits = {edit.id: edit for edit in stage.edits if edit.handler == "book"}
        self.bodies: dict[str, tuple[str, int, str, int]] = {}
        self.place: dict[str, tuple[str, int, str, int, int]] = {}  # topic, partition, key, offset, n
        places: dict[str, set[tuple[str, int]]] = defaultdict(set)
        payloads: dict[str, set[int]] = defaultdict(set)
        for entry in stage.log:
            places[entry.id].add((entry.topic, entry.partition))
            payloads[entry.id].add(entry.fingerprint)
        for effect in stage.effects:
            if effect.handler != "book":
                continue
            source = edits.get(effect.id) or at.get((effect.topic, effect.partition, effect.offset))
            if source is None or source.amount is None:
                continue  # invariants.py says so
            for n in range(_count(source.amount)):
                id = derived_id(stage.app, "book", effect.id, n)
                self.bodies[id] = (effect.id, n, source.key, source.amount)
                if effect.id not in edits and len(places[effect.id]) == 1 and len(payloads[effect.id]) == 1:
                    self.place[id] = (effect.topic, effect.partition, source.key, effect.offset, n)
        # An operator's payload may have been lost with a failover, after it was published.
        self.allowed = {id for edit in edits.values() for id in _ids(stage.app, edit.id)}
        self.either = {id for id, of in payloads.items() if len(of) > 1 for id in _ids(stage.app, id)}
        self.allowed |= self.either


def _count(amount: int) -> int:
    return 2 if amount % 3 == 0 else 1


def _ids(app: str, source: str) -> list[str]:
    return [derived_id(app, "book", source, n) for n in range(2)]


def judge(stage: SecondStage, *, everything_settled: bool = True) -> Violations:
    """Return the violations of I13.

    everything_settled: all is consumed and published, so what is missing is lost.
    """
    texts: list[str] = []
    expected = _Expected(stage)
    firsts: dict[str, Published] = {}
    for record in sorted(stage.published, key=lambda record: (record.partition, record.offset)):
        first = firsts.setdefault(record.id, record)
        if first.partition != record.partition:
            texts.append(f"{record.id} is in two partitions of the output topic")
        if record.id not in expected.bodies:
            if record.id not in expected.allowed:
                texts.append(f"ghost: {record.id} (for {record.body[0]}) is published, and was not committed")
        elif record.id not in expected.either and record.body != expected.bodies[record.id]:
            texts.append(f"{record.id} is published with another payload than its input asks for")
    if everything_settled:
        lost = sorted(set(expected.bodies) - set(firsts))
        texts += _examples(
            f"lost: {id} (for {expected.bodies[id][0]}) was committed, and is not published" for id in lost
        )
        texts += [f"a stream has stopped: {reason}" for reason in stage.stopped]
    texts += _order(expected, firsts.values())
    if stage.received is not None:
        texts += _next_application(stage, expected, firsts, everything_settled)
    return {"I13": _examples(texts)} if texts else {}


def _order(expected: _Expected, firsts: Iterable[Published]) -> list[str]:
    """Check the order of first occurrences.

    Of a key and an input partition, it is the order of the input.
    """
    latest: dict[tuple[int, str, int, str], tuple[int, int]] = {}
    texts = []
    for record in firsts:  # by partition and offset
        if (place := expected.place.get(record.id)) is None:
            continue
        topic, partition, key, *at = place
        unit = (record.partition, topic, partition, key)
        now = (at[0], at[1])
        if now <= latest.get(unit, (-1, -1)):
            texts.append(f"{record.id} is first published after what follows it: {unit}, {latest[unit]}, then {now}")
        latest[unit] = max(now, latest.get(unit, now))
    return texts


def _next_application(
    stage: SecondStage, expected: _Expected, firsts: dict[str, Published], everything_settled: bool
) -> list[str]:
    texts = []
    received = list(stage.received or ())
    counts = Counter(row.id for row in received)
    texts += [f"the next application has applied {id} {count} times" for id, count in counts.items() if count > 1]
    texts += [f"the next application has made {id} a dead letter" for id in stage.letters if id not in expected.either]
    if everything_settled:
        texts += [f"the next application has not applied {id}" for id in firsts if not counts[id]]
    sums: Counter[str] = Counter()
    for row in received:
        first = firsts.get(row.id)
        body = expected.bodies.get(row.id) if row.id not in expected.allowed else row.body
        if first is None or body is None:
            texts.append(f"the next application has applied {row.id}, which is not published")
            continue
        if row.body != body:
            texts.append(f"the next application has applied {row.id} with another payload")
        if (row.partition, row.offset) != (first.partition, first.offset):
            texts.append(f"the next application has applied {row.id} at a repetition")
        sums[body[2]] += body[3]
    balances = {key: balance for key, balance in stage.balances.items() if balance or key in sums}
    if received and balances != dict(sums):
        texts.append(f"balances come to {sum(balances.values())}, and should to {sum(sums.values())}")
    return texts


def _examples(texts: Iterable[str]) -> list[str]:
    all_texts = list(texts)
    more = len(all_texts) - _EXAMPLES_MAX
    return all_texts[:_EXAMPLES_MAX] + ([f"… {len(all_texts)} in all"] if more > 0 else [])
