"""A worker's topics follow what it has joined the group with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from consumer import App
from consumer.core.message import Partition
from consumer.core.ordering import Scheduler
from consumer.kafka.internals import ClientControl
from consumer.settings import Settings
from consumer.transaction.result import LedgerIds
from consumer.worker.shard import Shard
from consumer.worker.subscription import Subscription

pytestmark = pytest.mark.unit


async def take(body: dict[str, int]) -> None: ...


def app_of(*names: str) -> App:
    app = App("shop")
    app.handler(*names, topics=re.compile(r"payments\..*"), name="settle")(take)
    app.handler("payments.us", name="count")(take)
    return app


def shard_of(app: App) -> Shard:
    by_topic = app.by_topic()
    shard = Shard("", Settings(), LedgerIds(app.name, {}), Scheduler(by_topic, 1), by_topic=by_topic)
    shard.by_name |= app.handlers
    return shard


def test_new_topics_get_their_handlers_once() -> None:
    app, calls = app_of(), list[None]()
    shard = shard_of(app)
    schedulers_view = shard.by_topic  # the scheduler holds this object
    subscription = Subscription(app, [shard], lambda: calls.append(None))
    subscription.joined(["payments.us"])
    assert not calls
    subscription.joined(["payments.us", "payments.eu"])
    subscription.joined(["payments.us", "payments.eu"])
    assert calls == [None]
    assert {topic: [handler.name for handler in handlers] for topic, handlers in schedulers_view.items()} == {
        "payments.us": ["settle", "count"],
        "payments.eu": ["settle"],
    }
    subscription.joined(["payments.eu"])  # deleted: what is known of it stays
    assert subscription.topics == ["payments.eu", "payments.us"]


def test_each_shard_keeps_its_own_handlers() -> None:
    app, other = app_of(), app_of()
    shards = [shard_of(app), shard_of(other)]
    Subscription(app, shards).joined(["payments.eu"])
    assert shards[0].by_topic["payments.eu"] == [app.handlers["settle"]]
    assert shards[1].by_topic["payments.eu"] == [other.handlers["settle"]]


def test_intake_has_a_home_as_soon_as_a_topic_exists() -> None:
    app = App("shop")
    app.handler(topics=re.compile(r"payments\..*"))(take)
    subscription = Subscription(app, [shard_of(app)])
    assert subscription.home() is None
    subscription.joined(["payments.us", "payments.eu"])
    assert subscription.home() == Partition("payments.eu", 0)
    subscription.joined(["payments.us"])
    assert subscription.home() == Partition("payments.us", 0)
    named = app_of("absent")  # no worker would own a partition of it
    subscription = Subscription(named, [shard_of(named)])
    subscription.joined(["payments.us", "payments.eu"])
    assert subscription.home() == Partition("payments.eu", 0)


class Subscribed:
    """A client that is not connected, with a subscription by `takes`."""

    def __init__(self, takes: Callable[[str], bool]) -> None:
        self.rejoins = 0
        self.consumer: Any = AIOKafkaConsumer(group_id="shop")
        self.consumer._closed = True  # nothing is open
        self.consumer._coordinator = self
        self.state = self.consumer._subscription
        self.control = ClientControl(self.consumer)
        self.control.subscribe_matching(takes, None)

    def request_rejoin(self) -> None:
        self.rejoins += 1


async def test_the_client_joins_again_whenever_other_topics_match() -> None:
    """Else it fails for good.

    It asserts that its assignment is valid after it has looked for its coordinator.
    """
    client = Subscribed(lambda topic: topic == "a")
    assert client.consumer._client._topics == set()  # which is all
    assert client.state.subscribed_pattern.match("a") and not client.state.subscribed_pattern.match("ab")
    client.state.subscribe_from_pattern({"a"})
    assert client.state.topics == {"a"} and client.rejoins == 1


async def test_partitions_may_be_paused_and_sought_while_the_client_joins_again() -> None:
    """It has no assignment then, and lanes are still drained."""
    client, partition = Subscribed(lambda topic: True), Partition("a", 0)
    client.state.subscribe_from_pattern({"a"})
    client.state.assign_from_subscribed([TopicPartition(*partition)])
    client.control.pause(partition)
    assert client.control.is_paused(partition)
    client.state.subscribe_from_pattern({"a", "b"})
    client.control.pause(partition)
    client.control.resume(partition)
    client.control.seek(partition, 5)
    assert not client.control.is_assigned(partition)
