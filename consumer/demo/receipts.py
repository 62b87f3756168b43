"""Reads the receipts that the demo's handler has published."""

from __future__ import annotations

import time
from collections import Counter

from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.outbox.record import MESSAGE_ID
from consumer.settings import Settings

_POLL_SECONDS = 0.2
_QUIET_SECONDS = 1.0  # after the last record: copies of receipts may follow


async def read_receipts(settings: Settings, topic: str, partitions: int, wanted: int, seconds: float) -> Counter[bytes]:
    """Return how often each message id is in a topic.

    Reads until there are as many ids as wanted and nothing more comes, for at most so many seconds: Tansu does not say where
    a log ends.
    """
    source = KafkaConsumer(settings, None)
    await source.start(seconds)
    try:
        next_offsets = dict.fromkeys([Partition(topic, number) for number in range(partitions)], 0)
        source.assign(next_offsets)
        for partition in next_offsets:
            source.seek_and_resume(partition, 0)
        ids: Counter[bytes] = Counter()
        deadline = time.monotonic() + seconds
        quiet_at = time.monotonic() + _QUIET_SECONDS
        while time.monotonic() < deadline and (len(ids) < wanted or time.monotonic() < quiet_at):
            polled = await source.poll(_POLL_SECONDS, lambda partition: next_offsets.get(Partition(*partition)))
            for partition, records in polled.items():
                if records:
                    quiet_at = time.monotonic() + _QUIET_SECONDS
                    next_offsets[partition] = records[-1].offset + 1
                ids.update(dict(record.headers)[MESSAGE_ID] or b"" for record in records)
        return ids
    finally:
        await source.stop(5)
