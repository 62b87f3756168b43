"""Runs calls concurrently, but calls of one ordering key in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any

from consumer.core.delivery import Delivery


async def in_chains(
    deliveries: Iterable[Delivery],
    limit: int,
    run_one: Callable[[Delivery, asyncio.Task[Any] | None], Coroutine[Any, Any, None]],
) -> None:
    """Run `limit` messages at a time, those of one key in turn.

    The first exception ends all.
    """
    chains: dict[Hashable, list[Delivery]] = {}
    for delivery in deliveries:
        chains.setdefault(delivery.ordering_key(), []).append(delivery)
    waiting = iter(chains.values())

    async def work() -> None:
        task = asyncio.current_task()
        for chain in waiting:
            for delivery in chain:
                await run_one(delivery, task)

    tasks = [asyncio.create_task(work()) for _ in range(min(limit, len(chains)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
