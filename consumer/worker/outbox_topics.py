"""Checks the topics that an App declares to publish to."""

from __future__ import annotations

import logging

from consumer.app import App
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.kafka.admin import topic_configs
from consumer.kafka.errors import KafkaError
from consumer.logs import describe, event
from consumer.outbox.record import RECORD_BYTES_MAX
from consumer.settings import Settings
from consumer.worker.lifetime import Lifetime

_AGAIN_SECONDS = 1.0


async def check_topics(app: App, settings: Settings, lifetime: Lifetime) -> None:
    """Learn how large a record of each declared topic may be.

    Waits for Kafka until the worker stops. Raises Misconfigured for a topic that does not exist.
    """
    while app.publishes and not lifetime.is_stopping:
        try:
            configs = await topic_configs(settings, list(app.publishes))
        except (ServiceUnavailable, KafkaError, OSError) as error:
            event(logging.WARNING, "waiting for kafka", error=describe(error))
            await lifetime.pause(_AGAIN_SECONDS)
            continue
        for topic in app.publishes:
            if topic not in configs:
                raise Misconfigured(
                    f"App({app.name!r}, publishes=[...]): the topic {topic!r} does not exist; have it created, or do not declare it"
                )
            limit = (configs[topic] or {}).get("max.message.bytes")
            app.publishes[topic] = int(limit) if limit else RECORD_BYTES_MAX
        return
