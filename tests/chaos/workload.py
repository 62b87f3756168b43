"""What is produced: endless bursts of messages, derived from the seed alone.

10 % duplicates (a quarter of them on another partition), 2 % ids that are used again with another payload, 2 % poison,
2 % null values, and transactions, half of which are aborted. Keys are Zipf distributed. Poison and clashes have keys of
their own, since what fails may hold back its key, and a hot key that waits would leave little to see.
"""

from __future__ import annotations

import json
import random
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

CANARY = "canary-7f3a91"  # in every payload: it must be in no log
_KEYS = 40
_RECENT = 200


@dataclass(frozen=True)
class Planned:
    """One message to produce. kind: plain, duplicate, clash, unreadable, raises or null."""

    kind: str
    id: str
    key: str
    partition: int
    value: bytes | None


@dataclass(frozen=True)
class Burst:
    """Messages that are sent together.

    ending: "" outside a transaction, else commit or abort.
    """

    messages: tuple[Planned, ...]
    ending: str


def fingerprint(value: bytes | None) -> int:
    """The fingerprint, as documented: 64 bits of BLAKE2b, 0 for none.

    Written again here: the code under test must not answer for itself.
    """
    return 0 if value is None else int.from_bytes(blake2b(value, digest_size=8).digest(), "big", signed=True)


def partition_of(key: str, partitions: int) -> int:
    return zlib.crc32(key.encode()) % partitions


def plan(seed: int, partitions: int, size: int = 40) -> Iterator[Burst]:
    """Bursts without end. The same arguments give the same ones."""
    chance = random.Random(f"{seed}:workload")
    weights = [1 / rank for rank in range(1, _KEYS + 1)]
    recent: list[Planned] = []  # what may be produced again
    while True:
        ending = chance.choice(["commit", "abort"]) if chance.random() < 0.12 else ""
        messages = []
        for _ in range(6 if ending else size):
            planned = _message(chance, weights, [] if ending == "abort" else recent, partitions)
            messages.append(planned)
            if planned.kind in ("plain", "null") and ending != "abort":
                recent = [*recent[-_RECENT:], planned]
        yield Burst(tuple(messages), ending)


def _message(chance: random.Random, weights: list[float], recent: list[Planned], partitions: int) -> Planned:
    what = chance.random()
    id = str(uuid.UUID(int=chance.getrandbits(128)))
    amount = chance.randint(-500, 1000)
    if what < 0.10 and recent:
        again = chance.choice(recent)
        elsewhere = (again.partition + 1) % partitions if chance.random() < 0.25 else again.partition
        return Planned("duplicate", again.id, again.key, elsewhere, again.value)
    key = f"key-{chance.choices(range(_KEYS), weights)[0]}"
    if what < 0.12:
        candidates = [message for message in recent if message.key.startswith("clash-")]
        key = f"clash-{chance.randrange(6)}"
        if candidates and chance.random() < 0.5:
            before = chance.choice(candidates)
            return Planned("clash", before.id, before.key, before.partition, _value(before.key, amount + 5000))
    elif what < 0.14:
        key = f"bad-{chance.randrange(6)}"
        kind = chance.choice(["unreadable", "raises", "plain"])
        value = b"{" + CANARY.encode() if kind == "unreadable" else _value(key, amount, kind == "raises")
        return Planned(kind, id, key, partition_of(key, partitions), value)
    elif what < 0.16:
        return Planned("null", id, key, partition_of(key, partitions), None)
    return Planned("plain", id, key, partition_of(key, partitions), _value(key, amount))


def _value(key: str, amount: int, raises: bool = False) -> bytes:
    return json.dumps({"key": key, "amount": amount, "raises": raises, "note": CANARY}).encode()
