"""Derives a case from a seed: an application, a history, a fault.

One to three parts, messages and operators, and perhaps no fault.
"""

from __future__ import annotations

import random
from typing import Any

from verdicts.case import Case, Event, Fault, Handler, Heal, Operate, Send, Settle
from verdicts.parts import KEYS, Part, draw_part

_HOUR_MS = 3_600_000
# Of the effects of one message while it is settled; of rows, ledger, dead letters and log afterwards.
EFFECTS = ("effect_lost", "effect_doubled", "effect_altered", "effect_foreign", "effects_swapped")
ROWS = ("row_lost", "row_doubled", "row_altered", "row_foreign", "row_stamped")
LEDGER = ("ledger_lost", "ledger_foreign", "ledger_beyond", "ledger_tampered", "ledger_dead")
LETTERS = ("letter_removed", "letter_tampered")
FAULTS = (*EFFECTS, *ROWS, *LEDGER, *LETTERS, "log_head")


def draw(seed: int) -> Case:
    """The case of a seed."""
    chance = random.Random(seed)
    partitions = tuple(chance.choice([1, 1, 2, 3]) for _ in range(chance.choice([1, 1, 2, 2, 3])))
    parts = [draw_part(chance, f"{n}") for n in range(chance.choices([1, 2, 3], [5, 4, 1])[0])]
    handlers, firsts = _handlers(chance, parts, len(partitions))
    payloads: list[dict[str, Any]] = []
    history = _history(chance, handlers, partitions, payloads, firsts)
    kind = "none" if chance.random() < 0.4 else chance.choice(FAULTS)
    sent = sorted({event.payload for event in history if isinstance(event, Send)})
    fault = Fault(kind, chance.randrange(1 << 30), chance.choice(sent), chance.choice(sent))
    if kind == "effect_foreign":
        fault = Fault(kind, fault.chance, fault.payload, _payload(chance, payloads, ""))
    concurrent = chance.random() < 0.25
    tables = tuple(table for part in parts for table in part.tables)
    return Case(
        seed,
        tables,
        tuple(handlers),
        partitions,
        tuple(payloads),
        tuple(history),
        fault,
        batch=chance.choice([1, 3, 10, 500, 500]),
        lanes=2 if concurrent else 1,
        workers=chance.choice([1, 2]) if concurrent else 1,
        spread=not concurrent and chance.random() < 0.6,
        base=any(table.seeds for table in tables) and chance.random() < 0.4,
    )


def _handlers(chance: random.Random, parts: list[Part], topics: int) -> tuple[list[Handler], list[int]]:
    """The handlers, and the topics whose messages others wait for."""
    handlers: list[Handler] = []
    firsts: list[int] = []
    for number, part in enumerate(parts):
        for place, steps in enumerate(part.handlers):
            topic = chance.randrange(topics)
            if part.first == place:
                firsts.append(topic)
            batch = chance.choice([None, None, None, None, None, 5])
            order = chance.choice(["key"] * 6 + ["partition", "none"])
            handlers.append(Handler(f"h{number}{place}", topic, tuple(steps), chance.choice([1, 2]), batch, order))
    return handlers, firsts


def _payload(chance: random.Random, payloads: list[dict[str, Any]], boom: str, **more: Any) -> int:
    fields = {
        "i": f"m{len(payloads)}",
        "k": chance.choice(KEYS),
        "n": chance.randint(1, 9),
        "op": chance.choice("aabbc"),
    }
    payloads.append({**fields, "boom": boom, **more})
    return len(payloads) - 1


def _history(
    chance: random.Random,
    handlers: list[Handler],
    partitions: tuple[int, ...],
    payloads: list[dict[str, Any]],
    firsts: list[int],
) -> list[Event]:
    topics = sorted({handler.topic for handler in handlers})
    keyed, failing = chance.random() < 0.7, chance.random() < 0.5
    at = 0
    sent: list[Send] = []
    history: list[Event] = []
    for phase in range(chance.choice([1, 2, 2, 3])):
        if phase:
            history += _between(chance, payloads)
        for _ in range(chance.choice([2, 4, 6, 10])):
            at += chance.choice([0, 0, 1, 100, 5000])
            send = _send(chance, topics, partitions, payloads, sent, keyed, failing, at)
            sent.append(send)
            history.append(send)
    history += _between(chance, payloads)
    for topic in firsts:  # each message that waits gets what it waits for, in the end
        for k in KEYS:
            payload = _payload(chance, payloads, "", k=k, op="a")
            history.append(Send(payload, 1000 + payload, topic, chance.randrange(partitions[topic]), f"k{k}", at))
    history.append(Settle())
    if chance.random() < 0.5:
        history += _between(chance, payloads)
    return history


def _send(
    chance: random.Random,
    topics: list[int],
    partitions: tuple[int, ...],
    payloads: list[dict[str, Any]],
    sent: list[Send],
    keyed: bool,
    failing: bool,
    at: int,
) -> Send:
    topic = chance.choice(topics)
    what = chance.random()
    time = at + (_HOUR_MS if chance.random() < 0.05 else -_HOUR_MS if chance.random() < 0.05 else 0)
    earlier = chance.choice(sent) if sent and what < 0.17 else None
    partition = chance.randrange(partitions[topic])
    if earlier is not None and what < 0.1:  # sent again, maybe by way of another partition
        partition = earlier.partition if chance.random() < 0.7 else chance.randrange(partitions[earlier.topic])
        return Send(earlier.payload, earlier.id, earlier.topic, partition, earlier.key, time)
    boom = chance.choices(["", "raise", "reject"], [85, 10, 5])[0] if failing else ""
    payload = _payload(chance, payloads, boom)
    key = f"k{payloads[payload]['k']}"
    if keyed:  # as producers do it: a key has one partition
        partition = payloads[payload]["k"] % partitions[topic]
    elif chance.random() < 0.5:
        key = chance.choice([None, "x", "y"])  # type: ignore[assignment]
    return Send(payload, payload if earlier is None else earlier.id, topic, partition, key, time)


def _between(chance: random.Random, payloads: list[dict[str, Any]]) -> list[Event]:
    """Time goes by; maybe operators look at the dead letters."""
    events: list[Event] = [Settle(restart=chance.random() < 0.15)] if chance.random() < 0.8 else []
    if events and any(payload["boom"] for payload in payloads) and chance.random() < 0.7:
        if chance.random() < 0.8:
            events.append(Heal())
        what = chance.choice(["retry", "retry", "discard", "edit", "replace"])
        payload = _payload(chance, payloads, "") if what in ("edit", "replace") else 0
        events.append(Operate(what, chance.choice([1, 1, 5]), payload))
    return events
