"""What operators do from the pages: under their names, once, recorded."""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any

import pytest
from asgi_client import Answer
from console_client import Operator, text_of
from harness import ROOT, execute, query, until, value
from retry_desk import Desk

from consumer.console.auth import ByProxy
from consumer.console.jobs import Job, _follow

ADA = "ada@example.com"
WHY = {"why": "the handler is mended"}


@pytest.fixture
async def desk(database: str, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(database)
    await desk.open()
    # For the processes that the console starts.
    monkeypatch.setenv("TEST_DESK", desk.name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "support"])))
    return desk


def operator(desk: Desk, actions: bool = True) -> Operator:
    client = Operator.of(desk.app, desk.settings, ByProxy(None), actions=actions)
    client.console.path = client.console.jobs._path = "retry_desk:app"
    client.headers["x-forwarded-user"] = ADA
    return client


async def started(client: Operator, address: str, fields: dict[str, Any]) -> Job:
    answer = await client.post(address, {"form": secrets.token_hex(16), **WHY, **fields})
    assert answer.status == 303, text_of(answer)
    job = client.console.jobs.get(answer.headers["location"].rpartition("/")[2])
    assert job is not None
    return job


async def ended(job: Job) -> Job:
    async def has_ended() -> bool:
        return not job.is_running

    await until(f"{job.title} to end", has_ended, 120)
    return job


async def audit(desk: Desk) -> list[tuple[Any, ...]]:
    return await query(
        desk.dsn,
        "select action, dead_letter, operator, result, why from consumer.audit where app = $1 order by entry",
        desk.name,
    )


CHANGES = (
    ("POST", "/dead-letters/settle"),
    ("POST", "/dead-letters/1/edit"),
    ("POST", "/jobs/1/stop"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/outbox/1/resume"),
    ("POST", "/outbox/1/discard"),
    ("GET", "/dead-letters/settle?do=retry&group=abcdef0123"),
    ("GET", "/jobs"),
    ("GET", "/pause"),
)


async def test_read_only_console_changes_nothing(desk: Desk) -> None:
    await desk.letter("m1")
    client = operator(desk, actions=False)
    before = await desk.rows()
    for method, address in CHANGES:
        fields = {**WHY, "do": "retry", "letter": "1", "form": "0" * 32, "target": "", "at": "0", "rows": "1"}
        answer = await (client.get(address) if method == "GET" else client.post(address, fields))
        assert answer.status == 403 and "start it with --actions" in text_of(answer), address
    for address in ("/", "/dead-letters", "/dead-letters/1", "/outbox"):
        page = (await client.get(address)).body.decode()
        assert 'method="post"' not in page.replace('action="/dead-letters/1/message', "").replace(
            '<form method="post" #message">', ""
        ), address
        assert "/settle" not in page and "/pause" not in page
    assert await desk.rows() == before and await audit(desk) == [] and not client.console.jobs._jobs


async def test_letters_are_retried_edited_and_discarded(desk: Desk) -> None:
    chain = [
        await desk.letter("m0", key="k"),
        await desk.letter("m1", key="k", reason="behind", state="waiting"),
    ]
    edited, discarded, failing = (
        await desk.letter("m2"),
        await desk.letter("m3"),
        await desk.letter("m4", value=b"no json"),
    )
    client = operator(desk)
    confirm = await client.get(f"/dead-letters/settle?do=retry&letter={chain[0]}&letter={failing}")
    assert "2 of them are open" in text_of(confirm)
    page = await client.post(f"/dead-letters/{edited}/message")
    assert "Run it with this payload" in text_of(page)
    payload = '{"id": "mended",\r\n "n": "\u00fc<"}'
    form = secrets.token_hex(16)
    jobs = [
        await started(client, "/dead-letters/settle", {"do": "retry", "letter": [chain[0], failing], "form": form}),
        await started(client, f"/dead-letters/{edited}/edit", {"value": payload, "id": "same"}),
        await started(client, "/dead-letters/settle", {"do": "discard", "letter": discarded}),
    ]
    # The same form again, as by a second click, is the same job.
    again = await started(client, "/dead-letters/settle", {"do": "retry", "letter": [chain[0], failing], "form": form})
    assert again is jobs[0]
    too_many = await client.post(
        "/dead-letters/settle", {"do": "retry", "letter": failing, "form": secrets.token_hex(16), **WHY}
    )
    assert too_many.status == 409 and "jobs are running" in text_of(too_many)
    for job in jobs:
        await ended(job)
    assert [job.code for job in jobs] == [1, 0, 0], [job.error for job in jobs]
    assert sorted(await desk.done()) == ["m0", "m1", "mended"]
    shown = text_of(await client.get(f"/jobs/{jobs[0].id}"))
    assert "Not all of them are settled" in shown and "applied 2" in shown and "it waited behind" in shown
    assert "edit dead letter" in text_of(await client.get("/jobs"))
    assert await value(desk.dsn, "select new_value from consumer.letter_results where new_value is not null") == (
        payload.replace("\r\n", "\n").encode()
    )
    recorded = await audit(desk)
    assert {row[2] for row in recorded} == {ADA}
    assert {row[4] for row in recorded if row[0] != "dlq view"} <= {WHY["why"], "those before it are settled"}
    assert sorted((row[0], row[1], row[3]) for row in recorded) == sorted(
        [
            ("dlq view", edited, "shown"),
            ("dlq retry", chain[0], "applied"),
            ("dlq retry", chain[1], "applied"),
            ("dlq retry", failing, "unreadable"),
            ("dlq edit", edited, "applied"),
            ("dlq discard", discarded, "discarded"),
        ]
    )
    await client.console.jobs.close()


async def test_bulk_shows_progress_and_stops(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.many(1200)
    monkeypatch.setenv("TEST_DESK_PAUSE", "0.004")
    client = operator(desk)
    assert "1,200 of them are open" in text_of(await client.get("/dead-letters/settle?do=retry&group=abcdef0123"))
    job = await started(client, "/dead-letters/settle", {"do": "retry", "group": "abcdef0123"})

    async def has_progress() -> bool:
        return job.progress is not None and job.progress.done > 0

    await until("the first progress", has_progress, 120)
    page = (await client.get(f"/jobs/{job.id}")).body.decode()
    assert job.progress is not None and job.progress.total == 1200 and '<progress max="1200"' in page
    assert (await client.post(f"/jobs/{job.id}/stop")).status == 303
    await ended(job)
    assert job.code == 143 and job.answer is not None and "the rest is untouched" in job.error
    applied = len(await desk.done())
    assert 0 < applied < 1200 and job.answer["counts"] == {"applied": applied}
    assert "It ended early" in text_of(await client.get(f"/jobs/{job.id}"))


async def test_forms_without_what_they_need_change_nothing(desk: Desk) -> None:
    letter = await desk.letter("m1")
    unsure = await desk.letter("m2", reason="too_old")
    client = operator(desk)
    form = {"form": secrets.token_hex(16), **WHY}
    refused: list[tuple[str, dict[str, Any], int]] = [
        ("/dead-letters/settle", {**form, "do": "retry", "letter": letter, "why": " "}, 400),
        ("/dead-letters/settle", {**form, "do": "retry", "letter": letter, "why": "x" * 501}, 400),
        ("/dead-letters/settle", {**form, "do": "retry"}, 400),
        ("/dead-letters/settle", {**form, "do": "erase", "letter": letter}, 400),
        ("/dead-letters/settle", {**form, "do": "retry", "letter": "--all"}, 400),
        ("/dead-letters/settle", {**form, "do": "retry", "letter": letter, "form": "../x"}, 400),
        ("/dead-letters/settle", {**form, "do": "retry", "letter": unsure}, 409),
        (f"/dead-letters/{letter}/edit", {**form, "value": "{}"}, 400),
        ("/pause", {"target": ""}, 400),
        ("/pause", {**WHY, "target": "no-such-topic"}, 409),
        ("/pause", {**WHY, "target": "orders:77"}, 409),
        ("/pause", {**WHY, "target": "orders:x"}, 400),
        ("/resume", {**WHY, "target": ""}, 409),
        ("/outbox/77/resume", {**WHY, "at": "0"}, 409),
        ("/outbox/77/discard", {**WHY, "at": "0", "rows": "0"}, 400),
        ("/jobs/77/stop", {}, 404),
    ]
    for address, fields, status in refused:
        answer = await client.post(address, fields)
        assert answer.status == status, (address, fields, text_of(answer))
    assert await audit(desk) == [] and not client.console.jobs._jobs


async def test_pause_and_resume_are_recorded(desk: Desk) -> None:
    client = operator(desk)
    insert = "insert into consumer.positions (app, topic, partition, next_offset) values ('{}', 'orders', 0, 41)"
    await execute(desk.dsn, insert.format(desk.name))
    assert "orders" in text_of(await client.get("/pause?topic=orders"))
    async with client.console.watching():

        async def change(path: str, target: str) -> Answer:
            return await client.post(path, {**WHY, "target": target})

        assert (await change("/pause", "orders:0")).status == 303
        page = text_of(await client.get("/"))  # it waited for figures that show it
        assert f"paused by {ADA} : the handler is mended" in page.replace(f"{ADA}:", f"{ADA} :")
        assert "is paused already" in text_of(await change("/pause", "orders:0"))
        assert (await change("/pause", "orders")).status == 303
        assert "stays paused" in text_of(await change("/resume", "orders:0"))
        assert (await change("/resume", "")).status == 303
    assert await value(desk.dsn, "select count(*) from consumer.pauses") == 0
    assert [(row[0], row[2], row[4]) for row in await audit(desk)] == [
        ("pause", ADA, WHY["why"]),
        ("pause", ADA, WHY["why"]),
        ("resume", ADA, WHY["why"]),
        ("resume", ADA, WHY["why"]),
    ]


async def test_stopped_stream_is_resumed_where_it_was_seen(desk: Desk) -> None:
    await execute(
        desk.dsn,
        f"""with stream as (insert into consumer.outbox_streams (app, source_topic, source_partition, topic, next_seq)
                            values ('{desk.name}', 'orders', 0, 'invoices', 9) returning stream)
            insert into consumer.outbox_published (stream, next_seq, stopped, stopped_at)
            select stream, 4, 'MessageSizeTooLarge', now() from stream""",
    )
    number = await value(desk.dsn, "select stream from consumer.outbox_streams")
    client = operator(desk)
    assert "MessageSizeTooLarge" in text_of(await client.get("/outbox"))
    page = await client.get(f"/outbox/{number}")
    assert 'name="at" value="4"' in page.body.decode()
    stale = await client.post(f"/outbox/{number}/discard", {**WHY, "at": "3", "rows": "2"})
    assert stale.status == 409 and "has moved" in text_of(stale)
    assert (await client.post(f"/outbox/{number}/discard", {**WHY, "at": "4", "rows": "2"})).status == 303
    again = await client.post(f"/outbox/{number}/discard", {**WHY, "at": "6", "rows": "2"})
    assert again.status == 409 and "is not stopped" in text_of(again)
    recorded = await query(desk.dsn, "select action, operator, stream, numbers::text from consumer.audit")
    assert recorded == [("outbox discard", ADA, number, '{"to_seq": 6, "from_seq": 4}')]
    assert f"{ADA} discard 2" in text_of(await client.get(f"/outbox/{number}"))


async def test_output_of_a_command_is_followed(tmp_path: Path) -> None:
    from consumer.core.audit import ActedBy

    reader = asyncio.StreamReader(limit=1000)
    job = Job("1", "retry", ActedBy(ADA), "")
    reader.feed_data(b'{"event": "x"}\nconsumer: retrying: 1,500 of 20,000 dead letters (8%), 300/s, 62 s left\n')
    reader.feed_data(b"x" * 5000 + b"\nconsumer: PostgreSQL is away\n")
    reader.feed_eof()
    await _follow(job, reader)
    assert job.progress is not None and tuple(job.progress) == ("retrying", 1500, 20_000)
    assert job.error == "PostgreSQL is away"
