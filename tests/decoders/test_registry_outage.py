"""A worker whose registry is down.

What needs it waits, uncounted, in order; everything else goes on.
"""

from __future__ import annotations

import uuid

import msgspec
import pytest
from harness import Place, Sent, drained, migrated, query, until, value, working
from rebuild_runs import rebuilt
from replay_runs import outcome_counts, run_replay
from schema_registry import SchemaRegistry

from consumer import App, Tx
from consumer.decoders import Avro

SCHEMA = (
    '{"type": "record", "name": "Step", "fields": [{"name": "id", "type": "string"}, {"name": "n", "type": "int"}]}'
)


class Step(msgspec.Struct):
    id: str
    n: int


def step(id: int, name: str, n: int) -> bytes:
    raw = name.encode()
    return b"\0" + id.to_bytes(4, "big") + bytes([2 * len(raw)]) + raw + bytes([2 * n])


async def test_messages_wait_for_the_registry_and_others_go_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumer.decoders.registry.CONFIRM_SECONDS", 0.2)
    await migrated(place.dsn, "create table steps (serial serial, id text, n int); ")
    await query(place.dsn, 'grant all on steps, steps_serial_seq to "test-worker"')
    topic = await place.topic(2)
    app = App(f"steps-{uuid.uuid4().hex[:8]}", decode=Avro())

    @app.handler(topic, message_id="field:id")
    async def settle(step: Step, tx: Tx) -> None:
        tx.defer("insert into steps (id, n) values ($1, $2)", step.id, step.n)

    async def steps(like: str) -> list[tuple[str, int]]:
        return [tuple(row) for row in await query(
            place.dsn, "select id, n from steps where id like $1 order by serial", like
        )]  # fmt: skip

    with SchemaRegistry() as registry:
        known, later = registry.add("known-value", SCHEMA), registry.add("later-value", SCHEMA)
        settings = place.settings(schema_registry_url=registry.url)
        async with working(app, settings):
            await place.send(topic, Sent(step(known, "first", 0), key="k", partition=0))
            await until("a schema to be known", lambda: steps("first"))
            registry.is_down = True
            await place.send(
                topic,
                Sent(step(later, "a-1", 1), key="a", partition=0),
                Sent(step(known, "a-2", 2), key="a", partition=0),  # its schema is known, and it waits behind its key's
                Sent(step(known, "b-1", 1), key="b", partition=0),
                Sent(step(known, "c-1", 1), key="c", partition=1),
            )
            await until("other keys and partitions to go on", lambda: _both(steps, "b-%", "c-%"))
            await until(
                "the waiting message to be reported",
                lambda: value(place.dsn, "select count(*) from consumer.waiting where error like 'schema registry: %'"),
            )
            assert await steps("a-%") == []
            registry.is_down = False
            await until("the waiting messages", lambda: steps("a-2"))
            assert await steps("a-%") == [("a-1", 1), ("a-2", 2)]
            assert await value(place.dsn, "select count(*) from consumer.attempts") == 0
            assert await place.reasons() == []

            await place.send(topic, Sent(step(9999, "d-1", 1), key="d", partition=0), Sent(b"{}", partition=0))
            await drained(app, settings)
        assert await place.reasons() == ["unreadable", "unreadable"]
        texts = [row[0] for row in await query(place.dsn, "select error from consumer.dead_letters order by 1")]
        assert "plain JSON" in texts[0] and "schema 9999 is unknown to the registry" in texts[1]

        replayed = await run_replay(place, app, topic, settings={"schema_registry_url": registry.url})
        assert outcome_counts(replayed) == {"delivered": 7, "applied": 5, "unreadable": 2}
        assert (await rebuilt(place, app, settings=settings)).agrees


async def _both(steps: object, *likes: str) -> bool:
    return all([await steps(like) for like in likes])  # type: ignore[operator]
