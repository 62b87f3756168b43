"""Figures of a database that is away are missing and counted."""

from __future__ import annotations

import asyncio

import pytest
from harness import until

from consumer import App, Settings
from consumer.local_servers import free_port
from consumer.metrics.catalog import DATABASE_READS, HELD_UNITS
from consumer.metrics.fleet import Fleet
from consumer.monitoring.database_figures import DatabaseFigures

pytestmark = pytest.mark.unit


async def test_a_failed_read_is_counted_and_removes_older_figures() -> None:
    fleet = Fleet.of("billing", 1)
    fleet.totals.set_gauges("database ", [(HELD_UNITS, ("", "settle"), 3.0)])
    settings = Settings(postgres_dsn=f"postgresql://u@127.0.0.1:{free_port()}/none")
    reading = asyncio.create_task(DatabaseFigures(App("billing"), settings, fleet).run())
    try:
        await asyncio.sleep(0)
        assert (DATABASE_READS, ("", "failed")) not in fleet.totals.counters(), "before a worker has joined"
        fleet.report(0, fleet.started(0, 100), {"member": "m"})

        async def counted() -> bool:
            return fleet.totals.counters().get((DATABASE_READS, ("", "failed"))) == 1

        await until("the failure to be counted", counted)
        assert fleet.totals.gauges() == {} and not reading.done()
    finally:
        reading.cancel()
