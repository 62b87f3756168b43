"""Keeps the topics of one worker, by names and by patterns.

Kafka's client asks `takes` for each topic of the cluster whenever it refreshes its metadata, and joins the group again with
other topics. `joined` notes them before any of their partitions is opened. Limitations: asks no service.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

from consumer.app import App
from consumer.core.message import Partition
from consumer.logs import event
from consumer.outbox.streams import home
from consumer.worker.shard import Shard

_SHOWN_MAX = 20  # names of topics in a log event


class Subscription:
    """Which topics the worker subscribes to, and the handlers of each.

    on_new: called after topics were added.
    """

    def __init__(self, app: App, shards: Sequence[Shard], on_new: Callable[[], None] = lambda: None) -> None:
        self._app = app
        self._shards = shards
        self._on_new = on_new
        self._selection = app.selection
        self._current: Collection[str] = self._selection.names

    @property
    def has_patterns(self) -> bool:
        return self._app.has_patterns

    @property
    def topics(self) -> list[str]:
        """Those that handlers name or that were joined; some may be deleted."""
        return self._app.topics

    def takes(self, topic: str) -> bool:
        """Whether to consume a topic, should it exist."""
        return self._selection.takes(topic)

    def joined(self, topics: Collection[str]) -> None:
        """Note the topics with which the worker has joined the group now."""
        if not self.has_patterns:
            return
        self._current = topics
        self._app.discover(topics)
        by_topic = self._app.by_topic()
        new = sorted(by_topic.keys() - self._shards[0].by_topic.keys())
        for shard in self._shards:
            for topic in new:
                shard.by_topic[topic] = [shard.by_name[handler.name] for handler in by_topic[topic]]
        if new:
            event(logging.INFO, "patterns match topics", count=len(new), topics=",".join(new[:_SHOWN_MAX]))
            self._on_new()

    def home(self) -> Partition | None:
        """Return the partition whose owner publishes what `app.publishing` stored.

        With patterns, of the topics that exist; None while there is none.
        """
        return home(self._current)
