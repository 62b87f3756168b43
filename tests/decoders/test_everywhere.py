"""A decoder works the same everywhere.

In a worker, a replay, a rebuild, a retry and a test.
"""

from __future__ import annotations

import gzip
import uuid
from typing import Any

import msgspec
from harness import Place, Sent, letters, migrated, query
from outgoing import publish_all, records_of
from rebuild_runs import rebuilt
from replay_runs import outcome_counts, run_replay

from consumer import App, Tx
from consumer.dead_letters.edits import edit_of
from consumer.dead_letters.retry import DeadLetterRetrier
from consumer.decoders import CloudEvent, CloudEvents, Record
from consumer.testing import ExactlyOnce
from consumer.testing import Sent as TrialSent

TABLES = "create table paid (id text primary key, amount int); "


class Payment(msgspec.Struct):
    id: str
    amount: int


def unpacked(record: Record) -> msgspec.Raw:
    return msgspec.Raw(gzip.decompress(record.value or b""))


def packed(topic: str, value: Any) -> bytes:
    return gzip.compress(msgspec.json.encode(value), mtime=0)


async def test_a_decoder_is_used_everywhere(place: Place) -> None:
    await migrated(place.dsn, TABLES)
    await query(place.dsn, 'grant all on paid to "test-worker"')
    topic, out = await place.topic(), await place.topic()
    app = App(f"packed-{uuid.uuid4().hex[:8]}", decode=unpacked, encode=packed, publishes=[out])

    @app.handler(topic, message_id="field:id")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer("insert into paid values ($1, $2)", payment.id, payment.amount)
        tx.publish(out, {"paid": payment.id})

    a, b = packed("", Payment("a", 1)), packed("", Payment("b", 2))
    await place.send(topic, Sent(a), Sent(b), Sent(a), Sent(b"not packed"))
    await publish_all(app, place)
    assert await query(place.dsn, "select id, amount from paid order by id") == [("a", 1), ("b", 2)]
    [dead] = await letters(place.dsn)
    assert (dead["reason"], dead["error"]) == ("unreadable", "decode=: BadGzipFile")
    published = [gzip.decompress(record.value) for record in await records_of(place.kafka, out)]
    assert published == [b'{"paid":"a"}', b'{"paid":"b"}']

    assert outcome_counts(await run_replay(place, app, topic)) == {"delivered": 4, "applied": 3, "unreadable": 1}
    assert (await rebuilt(place, app)).agrees

    retrier = await DeadLetterRetrier.open(app, place.settings(), "ann")
    try:
        for handler in app.handlers.values():
            handler.bind({})
        number = dead["letter"]
        edit = edit_of(number, packed("", Payment("c", 3)), None)
        assert [done.outcome async for done in retrier.retry([number], edit)] == ["applied"]
    finally:
        retrier.close()
    assert await query(place.dsn, "select amount from paid where id = 'c'") == [(3,)]
    assert (await rebuilt(place, app)).agrees


async def test_tests_of_an_application_use_its_decoder(exactly_once: ExactlyOnce) -> None:
    app = App("events", decode=CloudEvents())

    @app.handler("events")
    async def settle(event: CloudEvent[Payment], tx: Tx) -> None:
        await tx.execute("insert into paid values ($1, $2)", event.data.id, event.data.amount)

    trial = await exactly_once(app, schema=TABLES)
    headers = {"ce_specversion": "1.0", "ce_id": "1", "ce_source": "/s", "ce_type": "t"}
    await trial.deliver(TrialSent("events", {"id": "a", "amount": 1}, headers=headers))
    assert [tuple(row) for row in await trial.fetch("select id, amount from paid")] == [("a", 1)]
