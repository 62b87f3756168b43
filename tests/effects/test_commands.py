"""Operators' commands and effects: a retry calls again under the first key.

A replay and a rebuild call no other system."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from harness import Place, Sent, consume_all, consumer, letters, query, value

from consumer import App, Call, Message, Retry, Tx
from consumer.core.identity import message_id
from consumer.dead_letters.retry import DeadLetterRetrier
from consumer.kafka.consumer import KafkaConsumer
from consumer.rebuild.rebuild import rebuild
from consumer.replay.options import Options, Progress
from consumer.replay.verify import replay


def app_of(topic: str, calls: list[str], fails: list[bool]) -> App:
    app = App(f"effects-{uuid.uuid4().hex[:8]}")

    @app.effect(topic, remembers=timedelta(hours=1), retry=Retry(attempts=1))
    async def charge(order: dict[str, Any], call: Call) -> str:
        calls.append(call.key)
        if fails[0]:
            raise TimeoutError
        return "receipt"

    @charge.settled
    async def charged(message: Message[dict[str, Any]], receipt: str, tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", f"{message.value['id']} {receipt}")

    return app


async def retried(app: App, place: Place) -> list[str]:
    numbers = [letter["letter"] for letter in await letters(place.dsn) if letter["state"] == "dead"]
    async with app.running():
        desk = await DeadLetterRetrier.open(app, place.settings(), "operator")
        done = [result async for result in desk.retry(numbers)]
        desk.close()
    return [result.outcome for result in done]


async def test_commands_after_a_call_without_a_result(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    calls: list[str] = []
    fails = [True]
    app = app_of(topic, calls, fails)
    await place.send(topic, Sent({"id": "a"}, id="a", key="k"), Sent({"id": "b"}, id="b", key="k"))
    await consume_all(app, place.settings())
    assert await place.reasons() == ["effect_unknown", "behind"]
    assert len(calls) == 1  # the one behind was not called
    shown = consumer(tmp_path, "show", app.name, "a", CONSUMER_POSTGRES_DSN=place.worker_dsn).stdout
    assert f"called by {app.name}/charge with idempotency key {calls[0]}: 1 since " in shown
    assert "its result is not known" in shown
    assert await retried(app, place) == ["effect_unknown"]
    fails[0] = False
    assert await retried(app, place) == ["applied", "applied"]
    assert calls[0] == calls[1] == calls[2] != calls[3]
    assert [row[0] for row in await place.effects()] == ["a receipt", "b receipt"]
    shown = consumer(tmp_path, "show", app.name, "a", CONSUMER_POSTGRES_DSN=place.worker_dsn).stdout
    assert f"idempotency key {calls[0]}: 3 since " in shown and "; result known since " in shown

    source = KafkaConsumer(place.settings(), None)
    await source.start(10)
    try:
        async with app.running():
            rebuilt = await rebuild(app, place.settings(), source, (await source.log.partitions([topic]))[topic])
    finally:
        await source.stop(5)
    assert rebuilt.agrees and rebuilt.applied == 2, rebuilt

    # Messages that the ledger has lost: one with a result, one without.
    await query(place.dsn, "truncate consumer.ledger, consumer.effects, consumer.dead_letters cascade")
    await query(
        place.dsn,
        """insert into consumer.effects (handler, id, key, payload, result)
           select handler, $1, 'k', 0, 'kept' from consumer.handlers where app = $2""",
        uuid.UUID(bytes=message_id(b"a")),
        app.name,
    )
    findings = await replay(app, place.settings(), [topic], Options(call_handlers=True), Progress())
    assert findings.total("missing") == 2
    await replay(app, place.settings(), [topic], Options(mode="apply"), Progress())
    assert await value(place.dsn, "select count(*) from effects where id = 'a kept'") == 1
    assert await place.reasons() == ["effect_unknown"]
    assert len(calls) == 4
    assert await retried(app, place) == ["applied"]
    assert len(calls) == 5
