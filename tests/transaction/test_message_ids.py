"""Which messages are one message, with all services.

Ids in headers, CloudEvents, UUIDs in any spelling, deletions, offsets, and what is compared of two payloads of one id. Each
producer that is imitated writes its headers as it really does.
"""

from __future__ import annotations

import json
import uuid
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest
from confluent_kafka import Producer
from harness import Place, Sent, consume_all, consumer, counts, letters, query

from consumer import App, Message, Reject, Retry, Tx
from consumer.core.idempotency import idempotency_key
from consumer.dead_letters.retry import DeadLetterRetrier
from consumer.kafka.consumer import KafkaConsumer
from consumer.rebuild.rebuild import rebuild
from consumer.replay.options import Options, Progress
from consumer.replay.verify import replay

QUICK = Retry(attempts=2, base=0.01, cap=0.05)
EFFECT = "insert into effects values ($1, 1, $2)"
UUID_TEXT = "0190a5c1-7ab4-7c3e-8f00-1234567890ab"
SPELLINGS = [
    UUID_TEXT.encode(),
    UUID_TEXT.upper().encode(),
    UUID_TEXT.replace("-", "").encode(),
    f"{{{UUID_TEXT}}}".encode(),
    f"urn:uuid:{UUID_TEXT}".encode(),
    f"URN:UUID:{UUID_TEXT.upper()}".encode(),
    uuid.UUID(UUID_TEXT).bytes,
]


class Payment(msgspec.Struct):
    id: str
    amount: int = 1
    attempt: int = 1


class ByUuid(msgspec.Struct):
    id: uuid.UUID
    amount: int = 1


def app_of(topic: str, value_type: Any = Payment, name: str = "", **options: Any) -> App:
    """An App whose handler leaves one row for each applied message."""
    app = App(name or f"app-{uuid.uuid4().hex[:8]}")

    async def settle(message: Message[Any], tx: Tx) -> None:
        amount = getattr(message.value, "amount", None)
        tx.defer(EFFECT, message.id, amount if isinstance(amount, int) else 1)

    settle.__annotations__["message"] = Message[value_type]
    app.handler(topic, name="settle", retry=QUICK, **options)(settle)
    return app


async def applied(place: Place) -> int:
    return len(await place.effects())


async def both_ways(place: Place, topic: str, app: App, *messages: Sent) -> None:
    """Send messages in one batch without Redis, then singly with it."""
    await place.send(topic, *messages)
    await consume_all(app, place.settings(redis_url=None))
    for message in messages:
        await place.send(topic, message)
    await consume_all(app, place.settings())


async def test_one_uuid_in_any_spelling_of_its_header_is_one_message(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic)
    await both_ways(place, topic, app, *[Sent({"id": "a"}, id=spelling) for spelling in SPELLINGS])
    assert await place.effects() == [(uuid.UUID(UUID_TEXT).hex, 1, 1)]
    assert await place.reasons() == []


async def test_one_uuid_in_any_spelling_of_a_field_is_one_message(place: Place) -> None:
    topic = await place.topic()
    texts = [spelling.decode() for spelling in SPELLINGS[:-1]]
    first = app_of(topic, Payment, message_id="field:id", fingerprint=None)
    await both_ways(place, topic, first, *[Sent({"id": text}) for text in texts])
    assert await applied(place) == 1
    for value_type, rule in ((ByUuid, "field:id"), (ByUuid, lambda value: value.id), (dict, lambda value: value["id"])):
        changed = app_of(topic, value_type, first.name, message_id=rule, fingerprint=None)
        await both_ways(place, topic, changed, *[Sent({"id": text}) for text in texts[:3]])
        assert await applied(place) == 1
    assert await place.reasons() == []


async def test_a_header_repeated_with_one_value_is_one_id(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic)
    one = Sent({"id": "a"}, headers=[("message-id", b"1"), ("x", b"y"), ("message-id", b"1")])
    other = Sent({"id": "a"}, headers=[("message-id", b"1"), ("message-id", b"2")])
    await both_ways(place, topic, app, one, Sent({"id": "a"}, id="1"))
    await place.send(topic, other)
    await consume_all(app, place.settings())
    assert await applied(place) == 1
    assert await place.reasons() == ["ambiguous_message_id"]


def binary(source: str | None, id: str, body: Any = None, prefix: str = "ce_") -> Sent:
    headers = [(f"{prefix}id", id.encode()), (f"{prefix}specversion", b"1.0")]
    headers += [(f"{prefix}source", source.encode())] if source is not None else []
    return Sent({"id": id} if body is None else body, headers=headers)


def structured(source: str, id: str) -> Sent:
    body = {"specversion": "1.0", "id": id, "source": source, "type": "paid", "data": {"amount": 1}}
    return Sent(body, headers=[("content-type", b"application/cloudevents+json; charset=UTF-8")])


async def test_a_cloudevent_is_its_source_and_its_id(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, dict)
    await both_ways(place, topic, app, binary("/eu", "1"), binary("/us", "1"), binary("/eu", "1", prefix="ce-"))
    assert await applied(place) == 2
    assert await place.reasons() == []


async def test_a_structured_cloudevent_sent_twice_is_applied_once(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, dict)
    await both_ways(place, topic, app, structured("/eu", "1"), structured("/us", "1"))
    assert await applied(place) == 2
    assert await place.reasons() == []


async def test_event_without_source_is_a_duplicate_only_by_the_handlers_rule(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, dict)
    await place.send(topic, binary(None, "1", {"a": 1}), binary(None, "1", {"a": 1}))
    await consume_all(app, place.settings())
    assert await place.reasons() == ["no_message_id", "no_message_id"]
    assert 'message_id="header:ce_id"' in (await letters(place.dsn))[0]["error"]
    other = app_of(topic, dict, message_id="header:ce_id")
    await consume_all(other, place.settings())
    assert await applied(place) == 1


async def test_header_that_reads_like_an_offset_is_another_message(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic)
    await place.send(topic, Sent({"id": "a"}, id=f"{topic}:0:1"), Sent({"id": "a"}))
    await consume_all(app, place.settings())
    assert await applied(place) == 2
    assert await place.reasons() == []


@pytest.mark.parametrize("rule", ["field:id", lambda value: value.id])
async def test_each_deletion_is_applied_once_where_the_id_is_in_the_value(place: Place, rule: Any) -> None:
    topic = await place.topic()
    app = app_of(topic, Payment | None, message_id=rule)
    await place.send(topic, Sent({"id": "a"}, key="a"), Sent(None, key="a"), Sent(None, key="b"))
    await consume_all(app, place.settings())
    await query(place.dsn, "update consumer.positions set next_offset = 0, seen_offset = null")
    await consume_all(app, place.settings(redis_url=None))
    assert await applied(place) == 3
    assert await place.reasons() == []
    assert (await counts(app, place.dsn))["settle"]["duplicates"]["ledger"] == 3


async def test_a_producer_of_another_language_writes_ids_that_are_found(place: Place, tmp_path: Any) -> None:
    topic = await place.topic()
    app = app_of(topic, dict)
    producer = Producer({"bootstrap.servers": place.kafka, "compression.type": "zstd"})
    spellings: list[dict[str, str | bytes | None] | list[tuple[str, str | bytes | None]]] = [
        {"message-id": UUID_TEXT},
        [("message-id", UUID_TEXT.upper()), ("message-id", UUID_TEXT)],
        [("message-id", uuid.UUID(UUID_TEXT).bytes)],
        {"ce_id": "1", "ce_source": "/eu", "ce_type": None},
        {"ce_source": "/eu", "ce_id": "1"},
    ]
    for headers in spellings:
        producer.produce(topic, b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode(), headers=headers)
    assert producer.flush(30) == 0
    await consume_all(app, place.settings())
    assert await applied(place) == 2
    assert await place.reasons() == []
    dsn = place.worker_dsn
    for arguments in ((UUID_TEXT,), ("urn:uuid:" + UUID_TEXT,), ("1", "--source", "/eu")):
        result = consumer(tmp_path, "show", app.name, *arguments, "--json", CONSUMER_POSTGRES_DSN=dsn)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["handlers"][0]["state"] == "applied"
    assert consumer(tmp_path, "show", app.name, "1", "--json", CONSUMER_POSTGRES_DSN=dsn).returncode == 1


async def test_the_offset_shows_a_message_without_an_id(place: Place, tmp_path: Any) -> None:
    topic = await place.topic()
    await place.send(topic, Sent({"id": "a"}))
    app = app_of(topic)
    await consume_all(app, place.settings())
    result = consumer(tmp_path, "show", app.name, f"{topic}:0:0", "--json", CONSUMER_POSTGRES_DSN=place.worker_dsn)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["handlers"][0]["offset"] == 0


# What is compared where an id comes again.


def rewritten(n: int) -> Sent:
    """One payment, as a relay writes it with other bytes each time."""
    body = [b'{"id":"a","amount":5}', b'{ "amount": 5, "id": "a" }', b'{"id":"a","amount":5,"sentAt":%d}' % n]
    return Sent(body[n % 3], id="1")


COMPARED: list[tuple[Any, int, list[str]]] = [
    ("bytes", 1, ["id_conflict"] * 2),
    ("value", 1, []),
    (lambda value: value.amount, 1, []),
    (None, 1, []),
]


@pytest.mark.parametrize(("option", "rows", "reasons"), COMPARED, ids=["bytes", "value", "function", "none"])
async def test_fingerprint_option_decides_which_payloads_conflict(
    place: Place, option: Any, rows: int, reasons: Any
) -> None:
    topic = await place.topic()
    app = app_of(topic, fingerprint=option)
    await both_ways(place, topic, app, *[rewritten(n) for n in range(3)])
    assert await applied(place) == rows
    assert await place.reasons() == reasons


async def test_another_value_of_a_compared_field_is_a_conflict(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, fingerprint=lambda value: value.amount)
    first, resent = Sent({"id": "a", "amount": 1}, id="1"), Sent({"id": "a", "amount": 1, "attempt": 2}, id="1")
    await both_ways(place, topic, app, first, resent, Sent({"id": "a", "amount": 2}, id="1"))
    assert await applied(place) == 1
    assert await place.reasons() == ["id_conflict"]


async def test_a_batch_handler_and_a_model_compare_values(place: Place) -> None:
    class Model(pydantic.BaseModel):
        id: str
        amount: Decimal

    topic = await place.topic()
    app = App(f"app-{uuid.uuid4().hex[:8]}")

    async def book(models: list[Any], tx: Tx) -> None:
        for model in models:
            tx.defer(EFFECT, model.id, int(model.amount))

    book.__annotations__["models"] = list[Model]
    app.handler(topic, batch=10, message_id="field:id", fingerprint="value")(book)
    bodies = [b'{"id":"a","amount":5}', b'{"amount":5.00,"id":"a"}', b'{"id":"a","amount":"5.0"}']
    await both_ways(place, topic, app, *[Sent(body) for body in bodies])
    assert await place.effects() == [("a", 1, 5)]
    assert await place.reasons() == []


@pytest.mark.parametrize("option", ["value", None])
async def test_a_handler_that_gets_a_rule_later_knows_the_messages_from_before(place: Place, option: Any) -> None:
    topic = await place.topic()
    before = app_of(topic)
    await place.send(topic, rewritten(0))
    await consume_all(before, place.settings(redis_url=None))
    after = app_of(topic, name=before.name, fingerprint=option)
    await place.send(topic, rewritten(0), *([rewritten(1)] if option is None else []))
    await consume_all(after, place.settings(redis_url=None))
    assert await applied(place) == 1
    assert await place.reasons() == []


@pytest.mark.parametrize(("second", "says"), [(rewritten(1), "equal"), (Sent({"id": "b"}, id="1"), "different")])
@pytest.mark.parametrize("together", [True, False])
async def test_the_dead_letter_of_a_used_id_says_whether_the_values_are_equal(
    place: Place, second: Sent, says: str, together: bool
) -> None:
    topic = await place.topic()
    app = app_of(topic)
    await place.send(topic, rewritten(0), *([second] if together else []))
    await consume_all(app, place.settings())
    if not together:
        await place.send(topic, second)
        await consume_all(app, place.settings())
    [letter] = await letters(place.dsn)
    assert letter["reason"] == "id_conflict"
    assert f"the decoded values are {says}" in letter["error"]


@pytest.mark.parametrize("option", ["value", None])
async def test_a_replay_and_a_rebuild_compare_as_the_handler_does(place: Place, option: Any) -> None:
    """That includes messages of before the handler had its rule."""
    topic = await place.topic()
    name = f"app-{uuid.uuid4().hex[:8]}"

    async def reject(payment: Payment, tx: Tx) -> None:
        if payment.amount < 0:
            raise Reject("negative")
        await tx.execute(EFFECT, payment.id, payment.amount)

    before, after = App(name), App(name)
    before.handler(topic, name="settle")(reject)
    after.handler(topic, name="settle", fingerprint=option)(reject)
    await place.send(topic, rewritten(0), Sent({"id": "b", "amount": -1}, id="2"))
    await consume_all(before, place.settings())
    await place.send(
        topic, *[Sent(body, id="3") for body in (b'{"id":"c"}', b'{ "id": "c" }', b'{"amount":1,"id":"c"}')]
    )
    await place.send(topic, Sent(b'{ "id": "b", "amount": -1 }', id="4"), rewritten(0))
    await consume_all(after, place.settings())
    assert await place.effects() == [("a", 1, 5), ("c", 1, 1)]
    assert await place.reasons() == ["rejected", "rejected"]
    findings = await replay(after, place.settings(), [topic], Options(), Progress())
    assert findings.ok and findings.total("missing") == 0 and findings.total("conflicts") == 0
    source = KafkaConsumer(place.settings(), None)
    await source.start(10)
    try:
        async with after.running():
            rebuilt = await rebuild(after, place.settings(), source, (await source.log.partitions([topic]))[topic])
    finally:
        await source.stop(5)
    assert (rebuilt.applied, rebuilt.dead_lettered) == (2, 2)
    assert rebuilt.agrees, rebuilt


async def test_dead_letter_of_an_event_is_retried_under_its_new_id_rule(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, dict)
    await place.send(topic, binary(None, "1", {"a": 1}), binary(None, "2", {"a": 1}))
    await consume_all(app, place.settings())
    changed = app_of(topic, dict, app.name, message_id="header:ce_id", fingerprint="value")
    numbers = [letter["letter"] for letter in await letters(place.dsn)]
    async with changed.running():
        desk = await DeadLetterRetrier.open(changed, place.settings(), "operator")
        done = [result async for result in desk.retry(numbers)]
        desk.close()
    assert [result.outcome for result in done] == ["applied", "applied"], done
    await place.send(topic, binary(None, "1", {"a": 1.0}))
    await consume_all(changed, place.settings())
    assert await applied(place) == 2


async def test_a_function_that_fails_leaves_a_dead_letter_that_names_it(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, fingerprint=lambda value: value.nothing)
    await place.send(topic, rewritten(0), Sent(b"{", id="2"))
    await consume_all(app, place.settings())
    assert await place.reasons() == ["unreadable", "unreadable"]
    assert (await letters(place.dsn))[0]["error"] == "fingerprint function: AttributeError"


async def test_bytes_that_are_no_json_are_named(place: Place) -> None:
    topic = await place.topic()
    app = app_of(topic, dict)
    body = json.dumps({"a": 1})
    await place.send(
        topic,
        Sent(b"\xef\xbb\xbf" + body.encode(), id="1"),
        Sent(body.encode("utf-16"), id="2"),
        Sent(body.encode("utf-16-le"), id="3"),
        Sent(b"\0\0\0\0\7" + body.encode(), id="4"),
        Sent(b'{"a":NaN}', id="5"),
    )
    await consume_all(app, place.settings())
    assert await applied(place) == 1
    texts = [letter["error"] for letter in await letters(place.dsn)]
    assert ["UTF-16" in texts[0], "UTF-16" in texts[1]] == [True, True]
    assert "Confluent's wire format (schema id 7)" in texts[2]
    assert "allow_nan=True" in texts[3]


async def test_a_key_for_other_systems_is_the_same_wherever_a_message_runs(place: Place) -> None:
    topic = await place.topic()
    app = App("keys-" + uuid.uuid4().hex[:8])
    keys: list[str] = []
    refuse = [True]

    @app.handler(topic, message_id="offset")
    async def settle(message: Message[bytes], tx: Tx) -> None:
        keys.append(message.idempotency_key("charge"))
        if refuse[0]:
            raise Reject("not yet")
        tx.defer(EFFECT, message.id, 1)

    await place.send(topic, Sent({"id": "a"}))
    await consume_all(app, place.settings())
    refuse[0] = False
    async with app.running():
        desk = await DeadLetterRetrier.open(app, place.settings(), "operator")
        done = [result async for result in desk.retry([letter["letter"] for letter in await letters(place.dsn)])]
        desk.close()
    assert [result.outcome for result in done] == ["applied"], done
    await query(place.dsn, "delete from consumer.ledger")
    findings = await replay(app, place.settings(), [topic], Options(call_handlers=True), Progress())
    assert findings.total("missing") == 1
    assert len(keys) == 3 and len(set(keys)) == 1
    assert keys[0] == idempotency_key(app.name, "settle", bytes.fromhex((await place.effects())[0][0]), "charge")
