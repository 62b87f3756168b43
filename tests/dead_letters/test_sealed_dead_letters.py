"""Dead letters that were changed in the table are not applied.

A check names them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Place, consume_all, consumer, query, value
from payments_app import QUICK, payment, payments_app
from replay_runs import run_replay

from consumer import App, Message, Reject, Tx
from consumer.core.dead_letter_seal import REST, VALUE, altered, seal
from consumer.core.message import LogRecord
from consumer.dead_letters.edits import Edit, edit_of
from consumer.dead_letters.retry import DeadLetterRetrier, RetryResult

RECORD = LogRecord("orders", 1, 7, 1000, b"key", b"value", (("a", b"1"), ("b\udcff", None)), "")


def row_of(record: LogRecord, **changed: Any) -> dict[str, Any]:
    row = {
        "seal": seal(RECORD),
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key": record.key,
        "value": record.value,
        "header_keys": [name.encode("utf-8", "surrogateescape") for name, _ in record.headers],
        "header_values": [value for _, value in record.headers],
    }
    return {**row, **changed}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({}, []),
        ({"seal": None}, None),
        ({"value": b"valu"}, [VALUE]),
        ({"value": None}, [VALUE]),
        ({"value": b""}, [VALUE]),
        ({"key": None}, [REST]),
        ({"key": b""}, [REST]),
        ({"offset": 8}, [REST]),
        ({"timestamp": 1001}, [REST]),
        ({"header_values": [b"1", b""]}, [REST]),
        ({"header_values": [None, b"1"]}, [REST]),
        ({"header_keys": [b"a1", b"b\xff"], "header_values": [b"", None]}, [REST]),
        ({"header_keys": [b"a"], "header_values": [b"1"]}, [REST]),
        ({"key": b"other", "value": b"other"}, [VALUE, REST]),
    ],
)
def test_seal_names_the_parts_that_were_changed(changed: dict[str, Any], parts: list[str] | None) -> None:
    assert altered(row_of(RECORD, **changed)) == parts


async def retried(place: Place, app: App, number: int, edit: Edit | None = None) -> list[RetryResult]:
    retrier = await DeadLetterRetrier.open(app, place.settings(), "test")
    try:
        return [done async for done in retrier.retry([number], edit)]
    finally:
        retrier.close()


RULES: dict[str, Any] = {"bytes": "bytes", "value": "value", "function": lambda body: body["id"], "nothing": None}


@pytest.mark.parametrize("rule", RULES)
async def test_dead_letter_with_another_value_is_named_and_not_applied(place: Place, rule: str) -> None:
    """That holds for every fingerprint rule.

    The function compares the id alone, which stays.
    """
    topic = await place.topic()
    app = App(f"app-{topic}")
    rejects = True

    @app.handler(topic, name="settle", fingerprint=RULES[rule])
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        if rejects and message.value["amount"] < 0:
            raise Reject("negative")
        tx.defer("insert into effects values ($1, 1, $2)", message.id, message.value["amount"])

    await place.send(topic, payment("a", amount=-1), payment("b", amount=-2), payment("c"))
    await consume_all(app, place.settings())
    assert (await run_replay(place, app, topic)).ok
    [(number, offset)] = await query(
        place.dsn,
        """update consumer.dead_letters set value = replace(convert_from(value, 'utf8'), '-1', '-1000')::bytea
           where convert_from(value, 'utf8') like '%"a"%' returning dead_letter, "offset" """,
    )
    findings = await run_replay(place, app, topic)
    assert findings.verdict().exit_code == 1
    [problem] = findings.problems()
    assert problem["kind"] == "altered_dead_letters" and problem["count"] == 1
    assert f"settle {topic}:0 offset {offset} (dead letter {number}: value)" in problem["text"]
    assert "1000" not in json.dumps(findings.as_dict()["samples"])
    rejects = False
    [done] = await retried(place, app, number)
    assert done.outcome == "altered" and f"`consumer dlq retry APP {number} --value FILE --same-id`" in done.text
    assert await value(place.dsn, "select count(*) from effects") == 1
    right = json.dumps({"id": "a", "account": 1, "amount": -1}).encode()
    [done] = await retried(place, app, number, Edit(right))
    assert done.outcome == "applied"
    assert await value(place.dsn, "select amount from effects where amount < 0") == -1


@pytest.mark.parametrize("column", ["key", "header_values"])
async def test_dead_letter_with_another_key_or_header_is_never_applied(place: Place, column: str) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a", amount=-1))
    await consume_all(app, place.settings())
    changed = {"key": "'other'", "header_values": "array['other'::bytea]"}[column]
    number = await value(place.dsn, f"update consumer.dead_letters set {column} = {changed} returning dead_letter")
    findings = await run_replay(place, app, topic)
    assert [problem["kind"] for problem in findings.problems()] == ["altered_dead_letters"]
    for edit in (None, Edit(json.dumps({"id": "a", "account": 1, "amount": 1}).encode())):
        [done] = await retried(place, app, number, edit)
        assert done.outcome == "altered" and "discard it" in done.text
    assert await value(place.dsn, "select count(*) from effects") == 0


async def test_commands_report_an_altered_dead_letter_in_one_line(place: Place, tmp_path: Path) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a", amount=-1))
    await consume_all(app, place.settings())
    number = await value(place.dsn, "update consumer.dead_letters set value = 'x' returning dead_letter")
    (tmp_path / "shop.py").write_text(
        f"from consumer import App, Tx\napp = App({app.name!r})\n"
        f"@app.handler({topic!r})\nasync def settle(payment: dict, tx: Tx) -> None: ...\n"
    )
    environment = {"CONSUMER_POSTGRES_DSN": place.dsn, "PYTHONPATH": str(tmp_path)}
    shown = consumer(tmp_path, "dlq", "show", "shop:app", str(number), **environment)
    assert shown.returncode == 0
    assert "altered            not as its message had it: value; " in shown.stdout
    result = consumer(tmp_path, "dlq", "retry", "shop:app", str(number), "--yes", **environment)
    assert result.returncode == 1 and "altered" in result.stdout and "--value FILE --same-id" in result.stdout
    as_json = consumer(tmp_path, "dlq", "show", "shop:app", str(number), "--json", **environment)
    assert json.loads(as_json.stdout)["altered"] == ["value"]


CHANGED_ROWS = {
    "another fingerprint": "update consumer.ledger set fingerprint = fingerprint + 1",
    "not applied": "update consumer.ledger set applied_at = null",
    "nothing": "select",
}


@pytest.mark.parametrize("edited", [False, True], ids=["as it was", "edited"])
@pytest.mark.parametrize("change", CHANGED_ROWS)
async def test_changed_row_of_a_retried_dead_letter_is_a_problem(place: Place, change: str, edited: bool) -> None:
    """That holds also where a second message has used the id.

    Its own conflict is one that a dead letter settles.
    """
    topic = await place.topic()
    app = App(f"app-{topic}")
    rejects = True

    @app.handler(topic, name="settle")
    async def settle(message: Message[dict[str, Any]], tx: Tx) -> None:
        if rejects:
            raise Reject("not yet")
        tx.defer("insert into effects values ($1, 1, $2)", message.id, message.value["amount"])

    await place.send(topic, payment("a", amount=1), payment("a", amount=2))
    await consume_all(app, place.settings())
    rejects = False
    number = await value(place.dsn, 'select dead_letter from consumer.dead_letters where "offset" = 0')
    right = Edit(json.dumps({"id": "a", "account": 1, "amount": 3}).encode()) if edited else None
    [done] = await retried(place, app, number, right)
    assert done.outcome == "applied"
    assert (await run_replay(place, app, topic)).ok
    await query(place.dsn, CHANGED_ROWS[change])
    findings = await run_replay(place, app, topic)
    if change == "nothing" or (edited and change == "another fingerprint"):  # of an edit only its payload is kept
        assert findings.ok
        return
    assert findings.verdict().exit_code == 1
    assert [problem["kind"] for problem in findings.problems()] == ["unsettled"]


@pytest.mark.parametrize(
    ("change", "exit_code", "detail"),
    [
        ("update consumer.ledger set fingerprint = fingerprint + 1 {}", 1, "of another payload"),
        ("update consumer.ledger set applied_at = null {}", 1, "of a dead letter"),
        ("delete from consumer.ledger {}", 1, "has no row"),
        ("select from consumer.ledger {}", 0, ""),
    ],
)
async def test_row_of_a_dead_letter_edited_under_a_new_id_is_checked(
    place: Place, change: str, exit_code: int, detail: str
) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK, fingerprint="value")
    await place.send(topic, payment("a", amount=-1), payment("b"))
    await consume_all(app, place.settings())
    number = await value(place.dsn, "select dead_letter from consumer.dead_letters")
    body = json.dumps({"id": "a", "account": 1, "amount": 1}).encode()
    [done] = await retried(place, app, number, edit_of(number, body, "auto"))
    assert done.outcome == "applied"
    await query(place.dsn, change.format('where "offset" < 0 returning id' if "select" not in change else ""))
    findings = await run_replay(place, app, topic)
    assert findings.verdict().exit_code == exit_code
    assert [problem["kind"] for problem in findings.problems()] == (["edited_dead_letters"] if exit_code else [])
    assert all(f"letter {number}: " in problem["text"] and detail in problem["text"] for problem in findings.problems())


async def test_forgotten_row_of_an_edited_dead_letter_leaves_the_verdict_unknown(place: Place) -> None:
    topic = await place.topic()
    app = payments_app(topic, retry=QUICK)
    await place.send(topic, payment("a", amount=-1), payment("b"))
    await consume_all(app, place.settings())
    number = await value(place.dsn, "select dead_letter from consumer.dead_letters")
    body = json.dumps({"id": "a", "account": 1, "amount": 1}).encode()
    await retried(place, app, number, edit_of(number, body, "auto"))
    await query(place.dsn, 'delete from consumer.ledger where "offset" < 0 returning id')
    await query(place.dsn, "update consumer.ledger_state set horizon = 'epoch'")
    findings = await run_replay(place, app, topic)
    assert [unknown["kind"] for unknown in findings.unknowns()] == ["edits_forgotten"]
