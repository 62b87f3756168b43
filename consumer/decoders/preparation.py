"""Fetches the schemas of messages before they are identified.

For decoders with a registry only. A worker sets messages aside whose schema does not come at once, and those of their order
behind them: the others go on. Commands and tests wait.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured
from consumer.core.evidence import FailureCause
from consumer.core.identity import offset_id
from consumer.core.outcome import RetryLater
from consumer.decoders.registry import CONFIRM_SECONDS, Registry, registry_for
from consumer.decoders.wire_format import SchemaKey
from consumer.settings import Settings

AT_ONCE_SECONDS = 1.0  # that a batch waits for schemas, before it goes on without the messages that need them
_AGAIN_SECONDS = 1.0
_BEHIND = RetryLater(0.0, "waits behind a message whose schema is not fetched")


def with_registry(codec: Any) -> Iterable[Any]:
    """Yield the decoders and encoders inside one that use a registry."""
    while codec is not None:
        if hasattr(codec, "use_registry"):
            yield codec
        codec = getattr(codec, "inner", None)


async def open_registry(codecs: Iterable[Any], encoder: Any, topics: Iterable[str], settings: Settings) -> None:
    """Give codecs their registry; fetch the schemas that are written.

    Raises Misconfigured for settings that are missing or wrong, and for a topic without a schema; ServiceUnavailable.
    """
    registry = registry_for(settings)
    for codec in codecs:
        for part in with_registry(codec):
            part.use_registry(registry)
    if not hasattr(encoder, "use_schema"):
        return
    for topic in topics:
        subject = f"{topic}-value"
        schema = await registry.latest(subject, settings.wait_seconds)
        if schema is None:
            raise Misconfigured(
                f"schema registry: no subject {subject!r}, which encode= writes with; register the schema of topic {topic!r}"
            )
        encoder.use_schema(topic, schema)


def _needed(deliveries: Iterable[Delivery]) -> dict[Registry, set[SchemaKey]]:
    needed: dict[Registry, set[SchemaKey]] = {}
    for delivery in deliveries:
        ask = delivery.handler.schema_needed
        if ask is not None and (pair := ask(delivery.record)) is not None:
            needed.setdefault(pair[0], set()).add(pair[1])
    return needed


async def fetch_schemas(deliveries: Sequence[Delivery], settings: Settings) -> None:
    """Fetch the schemas of messages.

    For commands, which wait for a registry as for other services. Raises ServiceUnavailable after ``wait_seconds``.
    """
    if not any(delivery.handler.schema_needed is not None for delivery in deliveries):
        return
    for registry, keys in _needed(deliveries).items():
        await registry.fetch_all(keys, max(settings.wait_seconds, 2 * CONFIRM_SECONDS))


async def set_aside(deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Fetch the schemas of a batch.

    Return the messages that can be identified.

    The others get an outcome: they are tried again, uncounted.
    """
    needed = _needed(deliveries)
    for registry, keys in needed.items():
        # A batch waits once for a schema, and not at all for a registry that is down.
        is_first = not registry.error and any(not registry.is_fetching(key) for key in keys)
        await registry.fetch(keys, AT_ONCE_SECONDS if is_first else 0)
    if not needed or not _needed(deliveries):
        return list(deliveries)
    ready: list[Delivery] = []
    blocked: set[Hashable] = set()
    for delivery in deliveries:
        ask = delivery.handler.schema_needed
        pair = None if ask is None else ask(delivery.record)
        if pair is None and delivery.ordering_key() not in blocked:
            ready.append(delivery)
            continue
        blocked.add(delivery.ordering_key())
        if not delivery.id:
            delivery.id = offset_id(delivery.record)  # until it is identified
        if pair is None:
            delivery.outcome = _BEHIND
            continue
        registry, _ = pair
        why = f"schema registry: {registry.error or 'a schema is being fetched'}"
        delivery.outcome = RetryLater(_AGAIN_SECONDS, why)
        if delivery.failure_cause is None or delivery.failure_cause.error != why:
            delivery.failure_cause = FailureCause(why, time.time(), systemic=True)
    return ready
