"""Produces orders and cancellations at rates that change.

With duplicates, conflicts, poison, and clocks that differ.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaProducer

# Messages a second, how often, and for how many seconds at least and at most.
RATES = ((0, 3, (1.0, 3.0)), (50, 5, (2.0, 5.0)), (500, 2, (0.5, 1.5)), (2000, 1, (0.2, 0.5)))
_KEYS = 30
_RECENT = 150
_TICK_SECONDS = 0.05


@dataclass
class Producing:
    """A producing task: `run` until it is cancelled.

    sent: by rate; kinds: by kind. recent: what may be produced again. repeats_seconds: no message is produced again
    later than that. A ledger that forgets sooner would rightly apply it twice.
    """

    servers: str
    orders: str
    cancellations: str
    chance: random.Random
    partitions: dict[str, int]  # of each topic; those added later have keys of their own
    skews_ms: tuple[int, ...] = (0, 40_000, -40_000)  # of the producers' clocks
    most: int = 250  # messages; after them only a few each second, so that replays stay short
    kinds: Counter[str] = field(default_factory=Counter)
    rates: Counter[int] = field(default_factory=Counter)
    repeats_seconds: float = math.inf
    recent: deque[tuple[str, int, str, str, bytes]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _kept_at: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))  # of those in `recent`
    added: list[int] = field(default_factory=list)  # partitions of the orders that were added meanwhile

    async def run(self) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self.servers, linger_ms=5, metadata_max_age_ms=1000)
        await producer.start()
        try:
            while True:
                rate, _, (least, most) = self.chance.choices(RATES, [rate[1] for rate in RATES])[0]
                if sum(self.kinds.values()) > self.most:
                    rate = min(rate, 20)
                await self._at(producer, rate, self.chance.uniform(least, most))
        finally:
            await producer.stop()

    async def _at(self, producer: AIOKafkaProducer, rate: int, seconds: float) -> None:
        begun, sent = time.monotonic(), 0
        while (elapsed := time.monotonic() - begun) < seconds:
            due = int(rate * elapsed)
            sent = max(sent, due - rate // 4)  # what a slow machine misses is not made up for
            await asyncio.gather(*[await self._send(producer) for _ in range(due - sent)])
            self.rates[rate] += due - sent
            sent = due
            await asyncio.sleep(_TICK_SECONDS)

    async def _send(self, producer: AIOKafkaProducer) -> Any:
        topic, partition, key, id, value = self._draw()
        if partition in self.added and partition not in await producer.partitions_for(topic):
            await producer.client.force_metadata_update()
            partition = 0
        at = int(time.time() * 1000) + self.chance.choice(self.skews_ms)
        headers = [("message-id", id.encode())]
        return await producer.send(
            topic, value, key=key.encode(), partition=partition, headers=headers, timestamp_ms=at
        )

    def _draw(self) -> tuple[str, int, str, str, bytes]:
        chance, what = self.chance, self.chance.random()
        while self._kept_at and time.monotonic() - self._kept_at[0] > self.repeats_seconds:
            self._kept_at.popleft()
            self.recent.popleft()
        id = str(UUID(int=chance.getrandbits(128)))
        amount = chance.randint(1, 1000)
        if what < 0.08 and self.recent:
            self.kinds["duplicates"] += 1
            topic, partition, key, id, value = chance.choice(self.recent)
            if chance.random() < 0.2:
                partition = (partition + 1) % self.partitions[topic]
            return topic, partition, key, id, value
        if what < 0.10 and self.recent:
            self.kinds["conflicts"] += 1
            topic, partition, key, id, value = chance.choice(self.recent)
            return topic, partition, key, id, json.dumps({**json.loads(value), "amount": amount + 5000}).encode()
        if what < 0.115:
            self.kinds["unreadable"] += 1
            return self._order(id, f"bad-{chance.randrange(5)}", b"{poison")
        if what < 0.13:
            self.kinds["failing"] += 1
            key = f"fails-{chance.randrange(5)}"
            return self._order(id, key, json.dumps({"key": key, "amount": amount, "fails": True}).encode())
        orders = [order for order in self.recent if order[0] == self.orders]
        if what < 0.25 and orders:
            unknown = chance.random() < 0.05
            self.kinds["cancellations of nothing" if unknown else "cancellations"] += 1
            key = f"void-{chance.randrange(5)}" if unknown else f"key-{chance.randrange(_KEYS)}"
            order = id if unknown else chance.choice(orders)[3]
            value = json.dumps({"order": order, "key": key}).encode()
            partition = zlib.crc32(key.encode()) % self.partitions[self.cancellations]
            return self._kept((self.cancellations, partition, key, id, value))
        self.kinds["orders"] += 1
        key = f"key-{chance.randrange(_KEYS)}"
        return self._kept(self._order(id, key, json.dumps({"key": key, "amount": amount}).encode()))

    def _order(self, id: str, key: str, value: bytes) -> tuple[str, int, str, str, bytes]:
        if self.added and self.chance.random() < 0.2:
            partition = self.chance.choice(self.added)
            return self.orders, partition, f"{key}+{partition}", id, value
        return self.orders, zlib.crc32(key.encode()) % self.partitions[self.orders], key, id, value

    def _kept(self, what: tuple[str, int, str, str, bytes]) -> tuple[str, int, str, str, bytes]:
        self.recent.append(what)
        self._kept_at.append(time.monotonic())
        return what
