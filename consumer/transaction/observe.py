"""Runs the handlers that opted out of the guarantee, before any transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence

from consumer.core.delivery import Delivery
from consumer.core.errors import Unreadable
from consumer.core.handler import Handler
from consumer.core.message import LogRecord
from consumer.core.outcome import SKIPPED, Reason, RetryLater
from consumer.transaction.arguments import argument_of
from consumer.transaction.chains import in_chains
from consumer.transaction.errors import facts_of
from consumer.transaction.invoke import finish_call, start_call
from consumer.transaction.isolate import decide
from consumer.transaction.limits import CallTracker
from consumer.transaction.result import BEHIND_RETRY


async def observe(
    deliveries: Iterable[Delivery], random: Callable[[], float], calls: CallTracker | None = None
) -> list[tuple[Delivery, Exception]]:
    """Run them for the messages of a batch; return what failed.

    Their messages end as skipped. One that fails is retried by its policy and then a dead letter, like any other; a
    batch that fails as a whole is called again message by message.
    """
    errors: list[tuple[Delivery, Exception]] = []
    blocked: set[Hashable] = set()  # ordering keys whose message failed: later ones wait behind it
    by_handler: dict[Handler, list[Delivery]] = {}
    for delivery in deliveries:
        if not delivery.handler.idempotent and delivery.outcome is None:
            by_handler.setdefault(delivery.handler, []).append(delivery)

    async def one(delivery: Delivery, _: object) -> None:
        if blocked and delivery.ordering_key() in blocked:
            delivery.outcome = BEHIND_RETRY
            return
        try:
            await _observe(delivery.handler, [delivery], calls)
            delivery.outcome = SKIPPED
        except Exception as error:
            facts = facts_of(error, delivery.handler.place)
            delivery.outcome, delivery.attempts = decide(delivery, facts, random)
            errors.append((delivery, error))
            if isinstance(delivery.outcome, RetryLater):
                blocked.add(delivery.ordering_key())

    for handler, messages in by_handler.items():
        if handler.batch is None:
            await in_chains(messages, handler.concurrency, one)
            continue
        for start in range(0, len(messages), handler.batch):
            chunk = messages[start : start + handler.batch]
            try:
                await _observe(handler, chunk, calls)
            except Exception:
                await in_chains(chunk, 1, one)
            else:
                for delivery in chunk:
                    delivery.outcome = SKIPPED
    return errors


async def _observe(handler: Handler, deliveries: Sequence[Delivery], calls: CallTracker | None) -> None:
    for delivery in deliveries:
        if isinstance(delivery.record, LogRecord) and delivery.record.fault:
            raise Unreadable(Reason.BAD_HEADER, delivery.record.fault)
    values = [argument_of(delivery, handler) for delivery in deliveries]
    since = time.monotonic()
    call = start_call(handler, values if handler.batch is not None else values[0], None, calls)
    if call is None and calls is not None:
        calls.ran(handler, time.monotonic() - since)
    await finish_call(handler, call, None, deliveries, calls)
