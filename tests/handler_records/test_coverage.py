"""What added, renamed or missing handlers miss can be filled."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest
from app_commands import command, status
from handler_versions import BOTH, ONE, RENAMED, app_with
from harness import Place, Result, consume_all, drained, fetched, is_one_line, query, until, value, working
from payments_app import lone_payment
from worker_log import WorkerLog

from consumer import App, Misconfigured
from consumer.worker.worker import Worker


async def effects(place: Place, handler: str) -> list[str]:
    rows = await query(place.dsn, "select id from effects where id like $1 order by id", f"{handler} %")
    return [row[0].split(" ")[1] for row in rows]


def missed(answer: dict[str, Any]) -> int:
    return sum(gap["past"] - gap["first"] for gap in answer["gaps"])


async def replay(place: Place, app: App, path: str, *arguments: str) -> Result:
    return await command(place, app, "replay", path, app.topics[0], *arguments)


async def rename(place: Place, app: App, old: str, new: str) -> Result:
    """As the owner of the schema."""
    owner = Place(place.kafka, place.dsn, place.redis_url)
    owner.worker_dsn = place.dsn
    return await command(owner, app, "migrate", app.name, "--rename-handler", old, new)


async def test_handler_added_in_a_rolling_deploy_knows_what_it_missed(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic(2)
    name = f"rolling-{uuid4().hex[:8]}"
    old, new = app_with(name, topic, "settle"), app_with(name, topic, "settle", "record")
    sent = [lone_payment(f"p{n:03}", n % 2) for n in range(60)]
    async with working(old, place.settings()) as first:
        await place.send(topic, *sent[:20])
        await drained(old, place.settings())
        async with working(new, place.settings()) as second:

            async def shared() -> bool:
                return fetched(first) == fetched(second) == 1

            await until("each version to have a partition", shared)
            await place.send(topic, *sent[20:40])
            await drained(new, place.settings())
        # The newer one has gone, and the older one has all partitions again.
        await place.send(topic, *sent[40:])
        await drained(old, place.settings())
    behind = worker_log.events("a handler begins behind the application")
    assert behind and {event["handler"] for event in behind} == {"record"}
    [lacking] = {event["handler"] for event in worker_log.events("this worker lacks a handler")}
    assert lacking == "record"
    assert len(await effects(place, "settle")) == 60 and len(await effects(place, "record")) == 10
    code, shown = await status(place, new, BOTH)
    assert code == 1 and missed(shown) == 50
    assert {gap["handler"] for gap in shown["gaps"]} == {"record"}
    [gap] = [notice for notice in shown["notices"] if notice["kind"] == "gap"]
    assert f"replay {BOTH} {topic} --apply --handler record" in gap["do"]
    await consume_all(new, place.settings())
    filled = await replay(place, new, BOTH, "--apply", "--handler", "record")
    assert filled.returncode == 0, filled.stderr + filled.stdout
    ids = [f"record {id}" for id in await _all_ids(place)]
    assert len(ids) == 60
    code, shown = await status(place, new, BOTH)
    assert (code, shown["gaps"], shown["notices"]) == (0, [], [])


async def _all_ids(place: Place) -> list[str]:
    """Ids that both handlers have applied, each once.

    Those of the fill are worker_app's own effects.
    """
    rows = await query(place.dsn, "select id, count(*) from effects where id like 'record %' group by id")
    assert all(count == 1 for _, count in rows)
    return [row[0] for row in rows]


async def test_position_moves_only_for_workers_with_the_handlers_that_it_names(
    place: Place, worker_log: WorkerLog
) -> None:
    """A worker that was fenced records what it settles as its own."""
    topic = await place.topic()
    name = f"fenced-{uuid4().hex[:8]}"
    old = app_with(name, topic, "settle")
    async with working(old, place.settings()):
        await place.send(topic, lone_payment("a"))
        await drained(old, place.settings())
        # As another version does when it opens the partition, while this one does not know that it lost it.
        numbers = "insert into consumer.handlers (app, name) values ($1, 'record') returning handler"
        number = await value(place.dsn, numbers, name)
        await query(
            place.dsn,
            "update consumer.positions set handlers = handlers || ',' || $2 where app = $1",
            name,
            str(number),
        )
        await query(
            place.dsn,
            "insert into consumer.coverage (handler, topic, partition, first_offset) values ($1, $2, 0, 1)", number, topic,
        )  # fmt: skip
        await place.send(topic, lone_payment("b"))
        await drained(old, place.settings())
    assert worker_log.events("positions have moved")
    rows = await query(place.dsn, "select first_offset, past_offset from consumer.coverage where handler = $1", number)
    assert rows == [(1, 1)]
    assert await effects(place, "settle") == ["a", "b"]


async def test_new_handler_that_begins_here_keeps_the_check_green(place: Place) -> None:
    topic = await place.topic()
    app = app_with(f"here-{uuid4().hex[:8]}", topic, "settle")
    both = app_with(app.name, topic, "settle", "record")
    await place.send(topic, *[lone_payment(f"p{n}") for n in range(10)])
    await consume_all(app, place.settings())
    await place.send(topic, *[lone_payment(f"q{n}") for n in range(10)])
    await consume_all(both, place.settings())
    assert (await status(place, both, BOTH))[0] == 1
    assert (await replay(place, both, BOTH)).returncode == 1  # messages are missing
    declare = ["positions", BOTH, "--handler", "record", "--begin-here"]
    done = await command(place, both, *declare, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"handler": "record", "topic": topic, "partition": 0, "first": 0, "past": 10}
    ]  # fmt: skip
    assert (await status(place, both, BOTH))[0] == 0
    checked = await replay(place, both, BOTH)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    again = await command(place, both, *declare)
    assert again.returncode == 1 and "nothing was changed" in again.stderr
    is_one_line(await command(place, both, "positions", BOTH, "--begin-here"), "--handler")
    is_one_line(await command(place, both, *declare[:3], "recrod", declare[4]), "no handler 'recrod'")
    is_one_line(await command(place, both, *declare, "--move-to", "0"), "--begin-here goes with --handler")
    assert len(await effects(place, "record")) == 10


async def test_renamed_function_is_reported_and_nothing_is_applied_twice(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic()
    old = app_with(f"renamed-{uuid4().hex[:8]}", topic, "settle")
    new = app_with(old.name, topic, "pay")
    await place.send(topic, *[lone_payment(f"p{n}") for n in range(10)])
    await consume_all(old, place.settings())
    # Before any worker runs with the new name, and after.
    for _ in range(2):
        code, shown = await status(place, new, RENAMED)
        assert code == 1
        [notice] = [notice for notice in shown["notices"] if notice["kind"] == "probable_rename"]
        assert notice["do"] == f"consumer migrate {old.name} --rename-handler settle pay"
        [gap] = [notice for notice in shown["notices"] if notice["kind"] == "gap"]  # and its advice doubles nothing
        assert gap["do"].startswith(f"if it was renamed: {notice['do']}, since --apply would apply its messages again")
        checked = await replay(place, new, RENAMED)
        assert checked.returncode == 1 and "renamed" in checked.stdout
        is_one_line(await replay(place, new, RENAMED, "--apply"), "--rename-handler", "nothing was changed")
        await consume_all(new, place.settings())
    assert len(await place.effects()) == 10
    async with working(new, place.settings()):
        [said] = await worker_log.wait("a handler begins behind the application")
        assert f"{old.name} --rename-handler settle pay, since --apply would apply" in said["do"]
        renamed = await rename(place, new, "settle", "pay")
        assert renamed.returncode == 0, renamed.stderr
        await place.send(
            topic, *[lone_payment(f"p{n}") for n in range(5)], lone_payment("q")
        )  # sent again, and a new one
        await drained(new, place.settings())
    assert len(await place.effects()) == 11
    code, shown = await status(place, new, RENAMED)
    assert (code, shown["notices"]) == (0, [])
    assert (await replay(place, new, RENAMED)).returncode == 0
    assert (await replay(place, new, RENAMED, "--apply")).returncode == 0
    assert len(await place.effects()) == 11
    with pytest.raises(Misconfigured, match="was renamed to 'pay'"):
        await consume_all(old, place.settings())
    is_one_line(await replay(place, old, ONE), "was renamed to 'pay'")
    log = await query(place.dsn, "select app, old_name, new_name from consumer.handler_renames")
    assert log == [(old.name, "settle", "pay")]
    back = await rename(place, new, "pay", "settle")
    assert back.returncode == 0, back.stderr
    await consume_all(old, place.settings())


async def test_rename_of_handlers_that_both_have_rows_is_refused(place: Place) -> None:
    topic = await place.topic()
    app = app_with(f"twice-{uuid4().hex[:8]}", topic, "settle")
    new = app_with(app.name, topic, "pay")
    await place.send(topic, lone_payment("a"))
    await consume_all(app, place.settings())
    await place.send(topic, lone_payment("b"))
    await consume_all(new, place.settings())
    is_one_line(await rename(place, app, "settle", "pay"), "has rows of its own", "--begin-here")
    is_one_line(await rename(place, app, "setle", "pay"), "has no handler 'setle'", "pay, settle")
    is_one_line(await rename(place, app, "pay", "pay"), "two names")
    as_worker = await command(place, app, "migrate", app.name, "--rename-handler", "settle", "pays")
    is_one_line(as_worker, "permission denied", "run it as the owner")
    names = await query(place.dsn, "select name from consumer.handlers where app = $1 order by 1", app.name)
    assert names == [("pay",), ("settle",)]
    named = await replay(place, new, RENAMED, "--apply", "--handler", "pay")  # who names it means it
    assert named.returncode == 0, named.stdout + named.stderr


async def test_rename_under_a_running_worker_with_the_old_name_ends_that_worker(place: Place) -> None:
    topic = await place.topic()
    old = app_with(f"running-{uuid4().hex[:8]}", topic, "settle")
    worker = asyncio.create_task(Worker(old, place.settings()).run())
    try:
        await place.send(topic, lone_payment("a"))
        await drained(old, place.settings())
        done = await rename(place, old, "settle", "pay")
        assert done.returncode == 0, done.stderr
        await place.send(topic, lone_payment("b"))
        with pytest.raises(Misconfigured, match="was renamed to 'pay'"):
            await asyncio.wait_for(worker, 60)
    finally:
        worker.cancel()
    rows = await query(
        place.dsn, "select distinct h.name from consumer.ledger join consumer.handlers h using (handler)"
    )
    assert rows == [("pay",)]


async def test_two_services_with_one_name_are_reported(place: Place, worker_log: WorkerLog) -> None:
    topic = await place.topic()
    one = app_with(f"mistake-{uuid4().hex[:8]}", topic, "settle")
    other = app_with(one.name, topic, "ship")
    await place.send(topic, lone_payment("a"))
    await consume_all(one, place.settings())
    await place.send(topic, lone_payment("b"))
    await consume_all(other, place.settings())
    [event] = worker_log.events("this worker lacks a handler")
    assert event["handler"] == "settle" and "another service needs another App name" in event["do"]


async def test_handlers_of_a_ledger_of_the_version_before_have_missed_nothing(place: Place) -> None:
    """Positions that name no handlers, and handlers that are marked as older."""
    topic = await place.topic()
    app = app_with(f"older-{uuid4().hex[:8]}", topic, "settle")
    await place.send(topic, lone_payment("a"), lone_payment("b"))
    await consume_all(app, place.settings())
    await query(place.dsn, "delete from consumer.coverage")
    await query(place.dsn, "update consumer.positions set handlers = null")
    await query(place.dsn, "update consumer.handlers set legacy = true")
    assert (await status(place, app, ONE))[0] == 0
    await consume_all(app, place.settings())
    assert (await status(place, app, ONE))[0] == 0
    both = app_with(app.name, topic, "settle", "record")
    await place.send(topic, lone_payment("c"))
    await consume_all(both, place.settings())
    code, shown = await status(place, both, BOTH)
    assert (code, missed(shown)) == (1, 2)
