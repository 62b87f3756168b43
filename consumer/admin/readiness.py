"""Check everything that workers need, before any of them starts.

What is wrong for one worker is wrong for all of them, so it is one error instead of one per worker.
"""

from __future__ import annotations

import asyncio
import logging

from consumer import logs, tls
from consumer.app import App
from consumer.core import topic_names
from consumer.core.errors import Misconfigured, ServiceUnavailable
from consumer.core.shard_route import Router
from consumer.handler_records import notices
from consumer.kafka.consumer import KafkaConsumer
from consumer.postgres.connection import PAUSE_SECONDS, dsn_label, translated_errors, wait_for
from consumer.postgres.errors import Outage
from consumer.postgres.session import Session
from consumer.retention import task
from consumer.settings import Settings
from consumer.sharding import shards


async def check_ready(app: App, path: str, settings: Settings) -> None:
    """Check the lifespan, PostgreSQL, Redis and Kafka; log what is doubtful.

    path: how commands name the App. Raises KafkaError, Misconfigured and ServiceUnavailable.
    """
    by_shard = shards.settings_of(app, settings)
    for on in by_shard.values():
        on.dsn  # noqa: B018 - raises when there is none
    target = settings.dead_letter_topic
    if target is not None and app.selection.takes(target):
        raise Misconfigured(
            f"--dead-letter-topic {target}: {app.name!r} consumes that topic itself, so its dead letters would come back to it "
            f"for ever; name another topic{'' if target in app.selection.names else ', or narrow the pattern that matches it'}"
        )
    await app.open_registry(settings)
    await _check_lifespan(app, settings)
    await _check_databases(app, path, list(by_shard.values()))
    await _check_redis(app, settings)
    await _check_topics(app, settings)


async def _check_lifespan(app: App, settings: Settings) -> None:
    """Enter and leave the lifespan once."""
    try:
        async with asyncio.timeout(max(settings.wait_seconds, 1)) as limit, app.running():
            pass
    except (Misconfigured, asyncio.CancelledError):
        raise
    except (Exception, SystemExit) as error:
        if limit.expired():
            raise Misconfigured(
                f"the lifespan of {app.name!r} took longer than --wait: something in it does not answer; check it, or raise --wait"
            ) from None
        raise Misconfigured(
            f"the lifespan of {app.name!r} failed: {logs.describe(error)}; correct what it needs"
        ) from None


async def _check_databases(app: App, path: str, databases: list[Settings]) -> None:
    opened = [(on, await _open_session(app, on)) for on in databases]
    try:
        await shards.check(app, Router(tuple(app.shards) or ("",), app.route), opened)
        for on, session in opened:
            with translated_errors(on):
                for notice in await notices.at_start(session.connection, app, path):
                    logs.event(logging.WARNING, notice.text, do=notice.do)
    except Outage as error:
        raise ServiceUnavailable(str(error)) from None
    finally:
        for _, session in opened:
            session.close()


async def _open_session(app: App, settings: Settings) -> Session:
    """Open a session, and wait for PostgreSQL as long as --wait allows."""
    outages = 0

    def after(outage: Outage) -> float:
        nonlocal outages
        outages += 1
        if outages == 1:
            logs.event(logging.WARNING, "waiting for postgresql", place=dsn_label(settings.dsn))
        return PAUSE_SECONDS

    return await wait_for(
        lambda left: Session.open(settings, left, app.connection_init), settings.wait_seconds, after=after
    )


async def _check_redis(app: App, settings: Settings) -> None:
    redis_url = tls.redis_url(settings)
    if redis_url is None:
        return
    from consumer.precheck.client import Precheck  # only with Redis: its driver takes time to import

    precheck = Precheck(redis_url, app.name, 1, 1)
    try:
        await precheck.start("")
    finally:
        await precheck.stop()


async def _check_topics(app: App, settings: Settings) -> None:
    source = KafkaConsumer(settings, None)
    await source.start(settings.wait_seconds)
    try:
        await _find_matching(app, source)
        by_topic = await source.log.partitions(app.topics)
        target = settings.dead_letter_topic
        if target is not None and not (await source.log.partitions([target]))[target]:
            raise Misconfigured(f"--dead-letter-topic {target}: there is no such topic; it must be created first")
        await task.check(settings, list(app.topics))
    finally:
        await source.stop(5)
    for topic, partitions in by_topic.items():
        if not partitions:
            logs.event(logging.WARNING, "topic does not exist yet; it is consumed as soon as it does", topic=topic)


async def _find_matching(app: App, source: KafkaConsumer) -> None:
    """Note the topics that patterns match; log patterns that match none."""
    if not app.has_patterns:
        return
    existing = await source.log.topics()
    app.discover(existing)
    for handler in app.handlers.values():
        if handler.pattern is not None and not any(topic_names.matches(handler.pattern, name) for name in existing):
            logs.event(
                logging.WARNING,
                "no topic matches a handler's pattern yet; those that do are consumed as soon as they exist",
                handler=handler.name,
                pattern=topic_names.text_of(handler.pattern),
                do="a pattern must match the whole name of a topic, and Kafka shows only topics that this user may see",
            )
