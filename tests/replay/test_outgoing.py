"""What handlers publish against Kafka: planted faults, and doubts.

A plain client is the oracle.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from harness import Place, Sent, consume_all, consumer, query, value
from outgoing import ids, publish_all, records_of
from outgoing import values as bodies

from consumer import App, Message, Misconfigured, Reject, Retry, Tx
from consumer.replay.findings import Findings
from consumer.replay.html import page
from consumer.replay.options import Progress
from consumer.replay.outgoing_run import OutgoingOptions, run_outgoing

QUICK = Retry(attempts=1, base=0.01, cap=0.05)


def name() -> str:
    return f"proof-{uuid.uuid4().hex[:8]}"


def totals_app(topic: str, out: str, code: str = "") -> App:
    """Publish each account's running total, which only the messages before it explain."""
    app = App(name(), publishes=[out])

    @app.handler(topic, retry=QUICK, version=code or None)
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        entry = message.value
        if entry.get("bad"):
            raise Reject("no such account")
        total = await tx.fetchval(
            "update accounts set balance = balance + $2 where id = $1 returning balance", entry["account"], entry["n"]
        )
        tx.publish(out, {"of": entry["n"], "total": total}, key=message.key, headers={"ce_type": "total"})

    return app


ACCOUNTS = "insert into accounts select generate_series(0, 99)"


def entries(start: int, count: int, **more: Any) -> list[Sent]:
    return [Sent({"n": n, "account": n % 3, **more}, id=f"id-{n}", key=str(n % 3)) for n in range(start, start + count)]


async def proof(place: Place, app: App, *topics: str, base: str | None = ACCOUNTS) -> Findings:
    options = OutgoingOptions(base=base)
    return await run_outgoing(app, place.settings(), topics, options, Progress())


def counts(findings: Findings) -> dict[str, int]:
    """Differences by kind and reason."""
    assert findings.outgoing is not None
    return {
        f"{row['kind']} {row['reason']}".strip(): row["count"] for row in findings.as_dict()["outgoing"]["differences"]
    }


async def put(place: Place, topic: str, *records: tuple[bytes | None, bytes, list[tuple[str, bytes]]]) -> None:
    """What another producer sends."""
    producer = AIOKafkaProducer(bootstrap_servers=place.kafka)
    await producer.start()
    try:
        for key, text, headers in records:
            await producer.send_and_wait(topic, text, key=key, headers=headers)
    finally:
        await producer.stop()


async def test_published_records_are_proved_and_planted_faults_found(place: Place) -> None:
    topic, out = await place.topic(partitions=2), await place.topic(partitions=3)
    app = totals_app(topic, out)
    bad = Sent({"n": 1000, "account": 1, "bad": True}, id="bad", key="bad")
    await place.send(topic, *entries(0, 40), *entries(5, 10), bad)
    await publish_all(app, place)
    await query(place.dsn, "update consumer.outbox_published set next_seq = 0 returning 1")
    await publish_all(app, place)  # everything comes twice, which is no fault
    records = await records_of(place.kafka, out)
    assert len(records) >= 80 and len(set(ids(records))) == 40
    before = await value(place.dsn, "select sum(balance) from accounts")

    good = await proof(place, app, topic)
    assert (good.verdict().exit_code, counts(good)) == (0, {}), good.as_dict()
    assert good.as_dict()["outgoing"]["topics"] == [{"topic": out, "expected": 40, "records": len(records), "ids": 40}]
    assert await value(place.dsn, "select sum(balance) from accounts") == before
    assert await value(place.dsn, "select count(*) from consumer.outbox") == 40

    # The last records are never sent, and the table says that they are.
    await place.send(topic, *entries(40, 3))
    await consume_all(app, place.settings(outbox_relay="off"))
    await query(
        place.dsn,
        """update consumer.outbox_published p set next_seq = s.next_seq from consumer.outbox_streams s
           where s.stream = p.stream returning 1""",
    )
    altered = records[7]
    await put(
        place,
        out,
        (b"1", b'{"of": 7}', [("message-id", str(uuid.uuid4()).encode())]),
        (b"1", b"no id", []),
        (altered.key, b'{"of": "another"}', list(altered.headers)),
    )
    in_kafka = {id: body for id, body in zip(ids(records), bodies(records), strict=True)}
    assert {body["of"] for body in in_kafka.values()} == set(range(40)), "the oracle sees what is missing: 40, 41, 42"

    findings = await proof(place, app, topic)
    assert counts(findings) == {"missing": 3, "extra": 2, "different": 1}
    assert findings.verdict().exit_code == 1
    assert {row["kind"]: row["count"] for row in findings.problems()} == {"missing": 3, "extra": 2, "different": 1}
    samples = findings.as_dict()["outgoing"]["samples"]
    [different] = [sample for sample in samples if sample["kind"] == "different"]
    assert (different["id"], different["detail"]) == (dict(altered.headers)["message-id"].decode(), "value")
    missing = [sample for sample in samples if sample["kind"] == "missing"]
    assert {sample["source_topic"] for sample in missing} == {topic} and not [s for s in missing if s["offset"]]
    html = page.render(findings.as_dict())
    assert different["id"] in html and "Output topics" in html and "Where handlers and output topics disagree" in html


async def test_doubtful_differences_are_no_faults(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = totals_app(topic, out)
    await place.send(topic, *entries(0, 20))
    await publish_all(app, place)
    await place.send(topic, *entries(20, 5))
    await consume_all(app, place.settings(outbox_relay="off"))
    waiting = await proof(place, app, topic)
    assert (counts(waiting), waiting.verdict().exit_code) == ({"missing unpublished": 5}, 2)
    assert "in the outbox, and not published yet" in waiting.answer()

    # An operator discards two of them, which is on record; the others are published.
    await query(
        place.dsn,
        """with stopped as (update consumer.outbox_published set next_seq = 22 returning stream)
           insert into consumer.outbox_actions (stream, operator, what, from_seq, to_seq, why)
           select stream, 'ann', 'discard', 20, 22, 'a test' from stopped returning 1""",
    )
    await publish_all(app, place)
    discarded = await proof(place, app, topic)
    assert (counts(discarded), discarded.verdict().exit_code) == ({"missing discarded": 2}, 0)
    assert any("discarded by an operator" in note for note in discarded.notes)

    admin = AIOKafkaAdminClient(bootstrap_servers=place.kafka)
    await admin.start()
    try:
        await admin.delete_records({TopicPartition(out, 0): RecordsToDelete(4)})
    finally:
        await admin.close()
    cut = await proof(place, app, topic)
    assert (counts(cut), cut.verdict().exit_code) == ({"missing discarded": 2, "missing truncated": 4}, 2)
    assert "whose first records are gone" in cut.answer()

    # Another topic of the App publishes there too: what is extra may be of its messages.
    other = await place.topic()
    await put(place, out, (b"1", b"{}", [("message-id", str(uuid.uuid4()).encode())]))
    await query(
        place.dsn,
        "insert into consumer.outbox_streams (app, source_topic, source_partition, topic, next_seq) values ($1, $2, 0, $3, 1) returning 1",
        app.name,
        other,
        out,
    )
    mixed = await proof(place, app, topic)
    assert mixed.verdict().exit_code == 2 and counts(mixed)["extra"] == 1
    assert f"messages of {other}" in mixed.answer()
    assert "edited value" not in mixed.answer()
    edit = "insert into consumer.audit (app, operator, action, result) values ($1, 'ann', 'dlq edit', 'applied') returning 1"
    await query(place.dsn, edit, app.name)
    assert "1 dead letter applied with an edited value" in (await proof(place, app, topic)).answer()


@pytest.mark.parametrize("how", ["drawn", "order"])
async def test_differences_between_runs_prove_nothing(place: Place, how: str) -> None:
    topic, out = await place.topic(partitions=2), await place.topic()
    app = App(name(), publishes=[out])

    @app.handler(topic)
    async def draw(message: Message[dict[str, Any]], tx: Tx) -> None:
        tx.defer("insert into effects values ($1, 1, 1)", str(message.value["n"]))
        drawn = str(uuid.uuid4()) if how == "drawn" else message.value["n"]
        tx.publish(out, {"drawn": drawn}, id=drawn if how == "drawn" else None)

    await place.send(topic, *entries(0, 10))
    await publish_all(app, place)
    findings = await proof(place, app, topic, base=None)
    if how == "order":
        assert (counts(findings), findings.verdict().exit_code) == ({}, 0)
        return
    # Each id is drawn: those in Kafka come from no run.
    assert findings.verdict().exit_code == 2 and counts(findings) == {"extra": 10, "missing unstable": 10}
    assert "under other ids in each run" in findings.answer()


async def test_changed_code_explains_a_difference(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    first = totals_app(topic, out, code="1")
    await place.send(topic, *entries(0, 5))
    await publish_all(first, place)
    changed = App(first.name, publishes=[out])

    @changed.handler(topic, name="settle", version="2")
    async def settle(entry: dict[str, Any], tx: Tx) -> None:
        tx.publish(out, {"of": entry["n"]})

    findings = await proof(place, changed, topic)
    assert findings.verdict().exit_code == 2 and counts(findings) == {"different": 5}
    assert "applied by other code than today's" in findings.answer()
    again = await proof(place, first, topic)
    assert again.verdict().exit_code == 0, again.as_dict()


SOURCE = """
from consumer import App, Tx
app = App({name!r}, publishes=[{out!r}])
silent = App({name!r})

@app.handler({topic!r})
async def forward(entry: dict, tx: Tx) -> None:
    tx.publish({out!r}, entry)
silent.handler({topic!r})(forward)
"""


async def test_the_command_answers_with_its_exit_codes(place: Place, tmp_path: Path, monkeypatch: Any) -> None:
    topic, out = await place.topic(), await place.topic()
    module = name().replace("-", "_")
    (tmp_path / f"{module}.py").write_text(SOURCE.format(name=module, topic=topic, out=out))
    monkeypatch.syspath_prepend(str(tmp_path))
    app = __import__(module).app
    await place.send(topic, *entries(0, 3))
    await publish_all(app, place)
    services = {"CONSUMER_POSTGRES_DSN": place.worker_dsn, "CONSUMER_KAFKA_BOOTSTRAP_SERVERS": place.kafka}

    def run(*arguments: str, of: str = "app") -> Any:
        return consumer(tmp_path, "replay", f"{module}:{of}", topic, "--outgoing", *arguments, **services)

    good = run("--report", "page.html")
    assert good.returncode == 0, good.stderr
    assert "The output topics have the 3 records that the handlers publish, and no others" in good.stdout
    assert "Output topics" in (tmp_path / "page.html").read_text()
    await put(place, out, (None, b"{}", []))
    bad = run("--json")
    assert bad.returncode == 1 and json.loads(bad.stdout)["problems"][0]["kind"] == "extra", bad.stderr
    for arguments, says, of in (
        (("--apply",), "--outgoing: it compares the whole of the topics", "app"),
        (("--from", "24h"), "--outgoing: it compares the whole of the topics", "app"),
        ((), "publishes nothing", "silent"),
    ):
        refused = run(*arguments, of=of)
        assert refused.returncode == 2 and says in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


async def test_tables_that_had_rows_before_make_no_wrong_fault(place: Place) -> None:
    topic, out = await place.topic(), await place.topic()
    app = totals_app(topic, out)
    await query(place.dsn, "update accounts set balance = 7 returning 1")
    await place.send(topic, *entries(0, 6))
    await publish_all(app, place)
    findings = await proof(place, app, topic, base=None)
    assert findings.verdict().exit_code == 2 and counts(findings) == {"different": 6}
    assert "accounts is not as the real one" in findings.answer()
    assert (await proof(place, app, topic, base=f"{ACCOUNTS}; update accounts set balance = 7")).ok


async def test_an_output_topic_that_is_gone_is_one_clear_line(place: Place) -> None:
    topic = await place.topic()
    app = totals_app(topic, "not-there")
    with pytest.raises(Misconfigured, match="the output topic 'not-there' does not exist"):
        await proof(place, app, topic)
