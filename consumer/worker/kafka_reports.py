"""Logs outages of Kafka, deleted topics and forbidden topics, once each.

Limitations: partitions that cannot be read one by one are kept by postgres/stopped_partitions.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from consumer.core.message import Partition
from consumer.kafka.protocol import Identity
from consumer.logs import describe, event

_LEADERLESS_SECONDS = 30.0


class KafkaState:
    """What a worker last saw of Kafka."""

    def __init__(self) -> None:
        self._is_unavailable = False
        self._seen: set[str] = set()
        self._deleted: set[str] = set()
        self._refused: frozenset[str] = frozenset()
        self._leaderless: dict[Partition, float] = {}

    @property
    def is_unavailable(self) -> bool:
        """Whether Kafka did not answer at last."""
        return self._is_unavailable

    def unavailable(self, error: Exception) -> None:
        """Note that Kafka does not answer."""
        if not self._is_unavailable:
            event(logging.WARNING, "waiting for kafka", error=describe(error))
        self._is_unavailable = True

    def available(self) -> None:
        """Note that Kafka answers."""
        if self._is_unavailable:
            event(logging.INFO, "kafka is back")
        self._is_unavailable = False

    def check_topics(self, wanted: Sequence[str], identity: Identity) -> None:
        """Log topics that disappeared, may not be read, or are back."""
        for topic in sorted(identity.refused - self._refused):
            event(
                logging.ERROR,
                "kafka does not let the worker see a topic",
                topic=topic,
                do="allow the worker's Kafka user READ and DESCRIBE on it (kafka-acls.sh); it goes on by itself",
            )
        self._refused = identity.refused
        if identity.cluster_id is None:
            return  # this broker names no topics by id
        self._seen |= set(identity.topics)
        missing = {topic for topic in wanted if topic in self._seen and topic not in identity.topics}
        deleted = missing - identity.refused
        for topic in sorted(deleted - self._deleted):
            event(
                logging.ERROR,
                "a topic was deleted: nothing more is read of it",
                topic=topic,
                do="create it again, or let no handler take it; positions of the old one need `consumer positions --adopt`",
            )
        for topic in sorted(self._deleted - deleted):
            event(logging.INFO, "a deleted topic exists again", topic=topic)
        self._deleted = deleted

    def long_leaderless(self, partitions: Collection[Partition], now: float) -> list[Partition]:
        """Return the leaderless partitions that have had no leader for long."""
        self._leaderless = {partition: self._leaderless.get(partition, now) for partition in partitions}
        return [partition for partition, since in self._leaderless.items() if now - since > _LEADERLESS_SECONDS]
