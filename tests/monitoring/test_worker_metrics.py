"""What a worker measures of itself, on real services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from harness import Place, Sent, query, until, working

from consumer import App, Retry, Tx
from consumer.metrics import catalog
from consumer.metrics.catalog import Metric
from consumer.metrics.recorder import Labels
from consumer.metrics.totals import Totals


class Reports:
    """Adds up what a worker in this process reports."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.totals.begin(1)

    def take(self, fields: dict[str, Any]) -> None:
        self.totals.report(1, fields.get("metrics"))

    def value(self, metric: Metric, *labels: str) -> float:
        """The value of one series, or 0.

        Of a histogram, its count.
        """
        series: tuple[Metric, Labels] = (metric, labels)
        distribution = self.totals.distributions().get(series)
        if distribution is not None:
            return sum(distribution.counts)
        return (self.totals.counters() | self.totals.gauges()).get(series, 0)

    def reaches(self, metric: Metric, *labels: str, least: float = 1) -> Callable[[], Awaitable[bool]]:
        async def reached() -> bool:
            return self.value(metric, *labels) >= least

        return reached


async def test_waiting_messages_and_lag(place: Place) -> None:
    topic, app, reports = await place.topic(), App("gauges"), Reports()
    works = False

    @app.handler(topic, name="settle", retry=Retry(attempts=100, base=0.05, cap=0.05))
    async def settle(payment: dict[str, Any], tx: Tx) -> None:
        if payment["bad"] and not works:
            raise ValueError("not yet")

    messages = [Sent({"bad": n == 0}, id=f"m{n}", key="k" if n < 3 else None) for n in range(6)]
    await place.send(topic, *messages)
    async with working(app, place.settings(http="127.0.0.1:0"), report=reports.take):
        await until("what waits behind", reports.reaches(catalog.WAITING, "settle", topic, "behind", least=2), 60)
        await until("lag", reports.reaches(catalog.LAG_MESSAGES, topic, "0", least=6), 60)
        await until("an older record", reports.reaches(catalog.LAG_SECONDS, topic, "0", least=0.1), 60)
        heads = [reports.value(catalog.WAITING, "settle", topic, reason) for reason in ("retry", "systemic")]
        assert sorted(heads) == [0, 1]
        assert reports.value(catalog.FAILED_ATTEMPTS, "settle", topic, "ValueError") >= 1
        works = True
        await until("the messages", reports.reaches(catalog.MESSAGES, "settle", topic, "applied", "", least=6), 60)

        async def nothing_waits() -> bool:
            lag = reports.value(catalog.LAG_MESSAGES, topic, "0") + reports.value(catalog.LAG_SECONDS, topic, "0")
            return lag == 0 and not any(metric is catalog.WAITING for metric, _ in reports.totals.gauges())

        await until("nothing to wait", nothing_waits, 60)
    assert reports.value(catalog.REBALANCES) == 1


async def test_stopped_partition_duplicates_and_outbox(place: Place) -> None:
    topic, target, reports = await place.topic(2), await place.topic(), Reports()
    app = App("stops", publishes=[target])

    @app.handler(topic, name="settle")
    async def settle(payment: dict[str, Any], tx: Tx) -> None:
        tx.publish(target, payment, key="k")

    settings = place.settings(http="127.0.0.1:0")
    await place.send(topic, *(Sent({}, id=f"m{n}", partition=n % 2) for n in range(10)))
    async with working(app, settings, report=reports.take):
        await until("published rows", reports.reaches(catalog.OUTBOX_PUBLISHED, target, least=10), 60)
        await place.send(topic, *(Sent({}, id=f"m{n}", partition=n % 2) for n in range(10)))
        await until("the age of a duplicate", reports.reaches(catalog.DUPLICATE_AGE, "settle"), 60)
        known = [
            reports.value(catalog.MESSAGES, "settle", topic, "duplicate", cause) for cause in ("precheck", "ledger")
        ]
        assert sum(known) == 10 and reports.value(catalog.PRECHECK, "hit") == known[0]
    await query(place.dsn, "update consumer.positions set topic_id = gen_random_uuid() where partition = 1")
    await place.send(topic, Sent({}, id="late", partition=1))
    stopped = Reports()
    async with working(app, settings, report=stopped.take):
        await until("the stop", stopped.reaches(catalog.PARTITION_STOPPED, topic, "1", "other_topic"), 60)
        assert stopped.value(catalog.PARTITION_STOPPED, topic, "0", "other_topic") == 0
