"""What a worker has said about Kafka as a whole: an outage and its end once each, topics that are gone or not allowed.

Logs; asks nobody. What it does not know: partitions that cannot be read one by one, which postgres/stopped_partitions.py keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from consumer.core.message import Partition
from consumer.kafka.source import Identity
from consumer.logs import describe, event

_LEADERLESS_SECONDS = 30.0


class KafkaState:
    """Whether Kafka answers, as this worker last saw it."""

    def __init__(self) -> None:
        self._is_away = False
        self._seen: set[str] = set()
        self._gone: set[str] = set()
        self._refused: frozenset[str] = frozenset()
        self._leaderless: dict[Partition, float] = {}

    def away(self, error: Exception) -> None:
        """Kafka does not answer: logged once for each outage."""
        if not self._is_away:
            event(logging.WARNING, "waiting for kafka", error=describe(error))
        self._is_away = True

    def back(self) -> None:
        """Kafka answers."""
        if self._is_away:
            event(logging.INFO, "kafka is back")
        self._is_away = False

    def topics(self, wanted: Sequence[str], identity: Identity) -> None:
        """Log topics that have disappeared or may not be read, once each."""
        for topic in sorted(identity.refused - self._refused):
            event(
                logging.ERROR,
                "kafka does not let the worker see a topic",
                topic=topic,
                do="allow the worker's Kafka user READ and DESCRIBE on it (kafka-acls.sh); it goes on by itself",
            )
        self._refused = identity.refused
        if identity.cluster_id is None:
            return  # this broker does not tell
        self._seen |= set(identity.topics)
        gone = {each for each in wanted if each in self._seen and each not in identity.topics} - identity.refused
        for topic in sorted(gone - self._gone):
            event(
                logging.ERROR,
                "a topic was deleted: nothing more is read of it",
                topic=topic,
                do="create it again, or remove its handlers; positions of the old one need `consumer positions --adopt`",
            )
        for topic in sorted(self._gone - gone):
            event(logging.INFO, "a deleted topic exists again", topic=topic)
        self._gone = gone

    def long_leaderless(self, partitions: Collection[Partition], now: float) -> list[Partition]:
        """Those of the partitions without a leader that have been so for long."""
        self._leaderless = {each: self._leaderless.get(each, now) for each in partitions}
        return [each for each, since in self._leaderless.items() if now - since > _LEADERLESS_SECONDS]
