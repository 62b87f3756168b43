"""Metrics of running workers, scraped while one of them is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from harness import ROOT, Command, Place, Sent, consumer, counts, is_one_line, running, until
from json_page import shapes
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import Prometheus, prometheus

from consumer import App, Tx
from consumer.metrics.catalog import BY_NAME, PREFIX, Kind

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def get(port: int, path: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        try:
            with urlopen(Request(f"http://127.0.0.1:{port}{path}"), timeout=20) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def scrape(port: int) -> Samples:
    status, text = await get(port, "/metrics")
    assert status == 200
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of a name that have these labels."""
    return sum(
        value for (one, given), value in samples.items() if one == name and labels.items() <= dict(given).items()
    )


def is_counter(name: str) -> bool:
    metric = BY_NAME.get(name) or BY_NAME.get(name.removesuffix("_bucket").removesuffix("_count"))
    return metric is not None and metric.kind in (Kind.COUNTER, Kind.HISTOGRAM)


class Scraper:
    """Scrapes all the time, and fails for a counter that falls."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.samples: Samples = {}

    async def look(self) -> Samples:
        samples = await scrape(self.port)
        for series, value in self.samples.items():
            if is_counter(series[0]):
                assert samples.get(series, -1.0) >= value, f"{series} fell"
        self.samples = samples
        return samples

    async def until(self, what: str, **expected: float) -> None:
        async def reached() -> bool:
            samples = await self.look()
            return all(
                total(samples, "messages_total", handler="settle", outcome=outcome) == number
                for outcome, number in expected.items()
            )

        await until(what, reached, 60)


async def port_of(command: Command) -> int:
    async def serving() -> Any:
        return next((event["port"] for event in command.events() if event["event"].startswith("serving")), None)

    return int(await until("the address to be served", serving, 60))


def message(number: int, account: int = 1, key: str | None = None) -> Sent:
    return Sent({"id": f"m{number}", "account": account, "amount": 1}, id=f"m{number}", key=key)


async def test_counters_survive_a_killed_worker_and_equal_the_ledger(place: Place, tmp_path: Path) -> None:
    topic = await place.topic(4)
    app = App("metered")

    @app.handler(topic, name="settle")
    async def settle(payment: dict[str, Any], tx: Tx) -> None: ...

    settings = place.settings(workers=2, http="127.0.0.1:0", dead_letter_limit=1)
    async with running(["run", "worker_app:app"], settings, tmp_path, TEST_TOPIC=topic, TEST_APP="metered") as command:
        port = await port_of(command)
        assert (await get(port, "/livez"))[0] == 200

        async def ready() -> bool:
            return (await get(port, "/readyz"))[0] == 200

        await until("both workers to be ready", ready, 60)
        async with prometheus(port, tmp_path, RULES) as server:
            scraper = Scraper(port)
            await place.send(topic, *(message(number) for number in range(200)))
            await scraper.until("the first messages", applied=200)
            await place.send(topic, *(message(number) for number in range(50)), message(900, -5))
            await scraper.until("duplicates and a dead letter", applied=200, duplicate=50, dead_lettered=1)

            os.kill(command.worker_pids()[0], signal.SIGKILL)

            async def restarted() -> bool:
                return total(await scraper.look(), "worker_restarts_total", reason="killed") == 1

            await until("the restart to be counted", restarted, 60)
            assert (await get(port, "/readyz"))[0] == 200
            await place.send(topic, *(message(number) for number in range(1000, 1200)))
            await scraper.until("the messages after the restart", applied=400, duplicate=50, dead_lettered=1)
            await check_samples(scraper, topic, await counts(app, place.dsn))
            status = json.loads((await get(port, "/status"))[1])
            assert status["handlers"]["settle"]["applied"] == 400 and status["restarts"] == {"killed": 1}
            assert sum(partition["lag"] or 0 for partition in status["partitions"]) == 0
            contract = shapes()["/status"]
            assert contract.faults(status) == []
            if server is not None:
                await check_prometheus(server)


async def check_prometheus(server: Prometheus) -> None:
    """A real server has scraped the same, and saw no counter fall."""

    async def has_all() -> bool:
        return await server.query(f'sum({PREFIX}messages_total{{handler="settle"}})') == [451]

    await until("Prometheus to have the last values", has_all, 60)
    assert await server.query(f"max(resets({PREFIX}messages_total[10m]))") == [0]
    assert await server.query(f"max(resets({PREFIX}handler_duration_seconds_count[10m]))") == [0]
    assert await server.query(f'sum({PREFIX}worker_restarts_total{{reason="killed"}})') == [1]


async def check_samples(scraper: Scraper, topic: str, ledger: dict[str, Any]) -> None:
    async def gauges_are_there() -> bool:
        samples = await scraper.look()
        return total(samples, "dead_letters", state="dead") == 1 and any(name == "lag_messages" for name, _ in samples)

    await until("what needs queries", gauges_are_there, 60)
    samples = await scraper.look()
    assert (
        total(samples, "messages_total", handler="settle", outcome="applied", topic=topic)
        == ledger["settle"]["applied"]
    )
    for cause, number in ledger["settle"]["duplicates"].items():
        assert total(samples, "messages_total", handler="settle", outcome="duplicate", cause=cause) == number, cause
    assert total(samples, "messages_total", cause="failed") == ledger["settle"]["dead_lettered"] == 1
    assert total(samples, "failed_attempts_total", handler="settle") == 2  # the handler allows two
    assert total(samples, "delay_seconds_count", handler="settle") == 400
    assert total(samples, "handler_duration_seconds_count", handler="settle") >= 400
    assert total(samples, "precheck_total") > 0
    committed = total(samples, "batches_total", result="committed")
    assert (
        total(samples, "batch_messages_count")
        == committed
        == total(samples, "batch_duration_seconds_count", step="commit")
    )
    assert total(samples, "rebalances_total") >= 2 and total(samples, "workers", state="running") == 2
    assert total(samples, "ledger_bytes") > 0 and total(samples, "database_reads_total", result="failed") == 0
    assert total(samples, "service_waiting") == 0


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "from consumer import App\napp = App('one')\n@app.handler('t')\nasync def h(m: dict) -> None: ...\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        dsn = "postgresql://localhost:1/none"
        result = await asyncio.to_thread(
            consumer, tmp_path, "run", "one:app", "--http", f"127.0.0.1:{port}", "--postgres-dsn", dsn
        )
    is_one_line(result, "the port is in use")


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "9464", "127.0.0.1:99999"])
async def test_an_address_that_may_not_be_served_is_one_line(tmp_path: Path, address: str) -> None:
    (tmp_path / "one.py").write_text(
        "from consumer import App\napp = App('one')\n@app.handler('t')\nasync def h(m: dict) -> None: ...\n"
    )
    result = await asyncio.to_thread(
        consumer, tmp_path, "run", "one:app", "--http", address, "--postgres-dsn", "postgresql://localhost:1/none"
    )
    is_one_line(result, "CONSUMER_HTTP")
