"""Checks the topics that an App publishes to."""

from __future__ import annotations

import logging

from consumer.app import App
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.kafka.admin import topic_configs
from consumer.kafka.errors import KafkaError
from consumer.kafka.log_inspection import LogInspection
from consumer.logs import describe, event
from consumer.outbox.record import RECORD_BYTES_MAX
from consumer.settings import Settings
from consumer.worker.lifetime import Lifetime

_AGAIN_SECONDS = 1.0


async def check_topics(app: App, settings: Settings, lifetime: Lifetime, log: LogInspection) -> None:
    """Learn how large a record of each declared topic may be.

    Waits for Kafka until the worker stops. Raises Misconfigured for a topic that does not exist or may not be written to.
    """
    places = {topic: f"App({app.name!r}, publishes=[{topic!r}])" for topic in app.publishes}
    if settings.dead_letter_topic is not None:
        places[settings.dead_letter_topic] = f"--dead-letter-topic {settings.dead_letter_topic}"
    while places and not lifetime.is_stopping:
        try:
            configs = await topic_configs(settings, list(places))
            refused = await log.not_writable(list(places))
        except (ServiceUnavailable, KafkaError, OSError) as error:
            event(logging.WARNING, "waiting for kafka", error=describe(error))
            await lifetime.pause(_AGAIN_SECONDS)
            continue
        for topic, place in places.items():
            if topic not in configs:
                raise Misconfigured(f"{place}: the topic does not exist; have it created, or do not declare it")
            if topic in refused:
                raise Misconfigured(
                    f"{place}: the topic may not be written to; give this Kafka user the right Write on it"
                )
        for topic in app.publishes:
            limit = (configs[topic] or {}).get("max.message.bytes")
            app.publishes[topic] = int(limit) if limit else RECORD_BYTES_MAX
        return
