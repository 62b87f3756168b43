"""A pause outlasts deaths of workers and rebalances."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

from harness import Place, Result, consumer, is_one_line, query, until
from worker_service import Service, message

from consumer.local_servers import free_port

RUN = "partitions are paused by an operator"


async def test_paused_partition_stands_still_while_workers_die(place: Place, tmp_path: Path) -> None:
    topic = await place.topic(2)
    service = Service(place, topic, tmp_path)

    async def command(*arguments: str) -> Result:
        dsn = place.worker_dsn
        return await asyncio.to_thread(consumer, tmp_path, *arguments, CONSUMER_POSTGRES_DSN=dsn)

    async def applied() -> set[str]:
        rows = await query(place.dsn, "select id from effects where id like 'settle %'")
        return {row[0].removeprefix("settle ") for row in rows}

    async def settled(*names: str) -> None:
        async def all_there() -> bool:
            return await applied() >= set(names)

        await until(f"{names} to be applied", all_there, 120)

    def logged(events: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
        return [event for event in events if event["event"] == text]

    target = ["--topic", topic, "--partition", "0"]
    port = free_port()
    async with service.run_with("--workers", "1", "--http", f"127.0.0.1:{port}") as first:
        await place.send(topic, message("a0", 1, partition=0), message("a1", 2, partition=1))
        await settled("a0", "a1")
        paused = await command("pause", service.name, *target, "--why", "the table is repaired", "--json")
        assert paused.returncode == 0, paused.stderr
        assert [row["why"] for row in json.loads(paused.stdout)["changed"]] == ["the table is repaired"]

        async def obeyed() -> bool:
            return bool(logged(first.events(), RUN))

        await until("the worker to obey", obeyed, 60)
        await place.send(topic, message("b0", 1, partition=0), message("b1", 2, partition=1))
        await settled("b1")
        assert not logged(first.events(), "partitions revoked")

        async def measured() -> bool:
            return f'topic="{topic}"}} 1.0' in "".join(line for line in await _metrics(port) if "_paused{" in line)

        await until("the metrics to show it", measured, 60)

    # Killed, with its worker. Two others share the partitions.
    async with service.run(2, "second") as second:
        await service.opened(second, 2, workers=2)
        await place.send(topic, message("c0", 1, partition=0), message("c1", 2, partition=1))
        await settled("c1")
        assert await applied() == {"a0", "a1", "b1", "c1"}
        again = await command("pause", service.name, *target, "--why", "once more")
        assert again.returncode == 0 and f"{topic}:0 is paused already" in again.stdout
        resumed = await command("resume", service.name, "--topic", topic, "--why", "repaired")
        assert resumed.returncode == 0 and f"{topic}:0 of {service.name} goes on" in resumed.stdout
        await settled("a0", "b0", "c0")
        await service.stop(second)
    assert await query(place.dsn, "select count(*), count(distinct id) from effects") == [(12, 12)]
    recorded = await query(place.dsn, "select action, why, topic, partition from consumer.audit order by entry")
    assert recorded == [("pause", "the table is repaired", topic, 0), ("resume", "repaired", topic, 0)]


async def _metrics(port: int) -> list[str]:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return str(answer.read(), "utf-8")

    return (await asyncio.to_thread(read)).splitlines()


async def test_wrong_targets_and_needless_commands_change_nothing(place: Place, tmp_path: Path) -> None:
    await query(place.dsn, "insert into consumer.positions (app, topic, partition, next_offset) values ('shop', 'orders', 0, 1), ('shop', 'orders', 1, 1)")  # fmt: skip

    async def command(*arguments: str) -> Result:
        return await asyncio.to_thread(consumer, tmp_path, *arguments, CONSUMER_POSTGRES_DSN=place.worker_dsn)

    why = ["--why", "x"]
    is_one_line(await command("pause", "shap", *why), "APP 'shap': not known", "did you mean shop?")
    is_one_line(await command("pause", "shop", "--topic", "order", *why), "did you mean orders?")
    unknown = await command("pause", "shop", "--topic", "orders", "--partition", "2", *why)
    is_one_line(unknown, "--partition 2", "it has 0 to 1")
    is_one_line(await command("pause", "shop", "--partition", "1", *why), "it goes with --topic")
    is_one_line(await command("pause", "shop"), "--why")
    none = await command("resume", "shop", *why)
    assert none.returncode == 0 and "is not paused; nothing was changed" in none.stdout
    assert await query(place.dsn, "select * from consumer.pauses") == []
    assert await query(place.dsn, "select * from consumer.audit") == []
    assert (await command("pause", "shop", *why)).returncode == 0
    narrow = await command("resume", "shop", "--topic", "orders", "--partition", "1", *why)
    is_one_line(narrow, "orders:1: still paused", "the whole App: x", code=1)
    assert (await command("resume", "shop", *why)).returncode == 0
    assert await query(place.dsn, "select * from consumer.pauses") == []
