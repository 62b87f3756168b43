"""Changes as Debezium for PostgreSQL writes them (debezium.json), and what is none.

The oracle for values is PostgreSQL itself: the same row, read by asyncpg when the file was written.
"""

from __future__ import annotations

import copy
import json
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

from consumer import App
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.core.outcome import Dead, Reason
from consumer.decoders import Change, Debezium
from consumer.transaction.identify import decoded, identify

pytestmark = pytest.mark.unit

FIXTURES = json.loads((Path(__file__).parent / "debezium.json").read_text("utf-8"))
WITH_SCHEMAS, WITHOUT = FIXTURES["with_schemas"], FIXTURES["as_text"]


class Thing(msgspec.Struct):
    id: int
    price: Decimal | None = None
    free: Decimal | None = None
    day: date | None = None
    clock: time | None = None
    at: datetime | None = None
    at_ms: datetime | None = None
    zoned: datetime | None = None
    raw: bytes | None = None
    flag: bool | None = None
    ratio: float | None = None
    body: str | None = None
    tags: list[str] | None = None
    big: int | None = None


class ThingModel(pydantic.BaseModel):
    id: int
    price: Decimal | None = None
    at: datetime | None = None


ROW = Thing(
    id=1,
    price=Decimal("12345678901234567890.1230"),
    free=Decimal("1.50"),
    day=date(2026, 1, 2),
    clock=time(3, 4, 5, 678901),
    at=datetime(2026, 1, 2, 3, 4, 5, 678901),
    at_ms=datetime(2026, 1, 2, 3, 4, 5, 679000),
    zoned=datetime(2026, 1, 2, 3, 4, 5, 678901, UTC),
    raw=b"\x00\xff",
    flag=True,
    ratio=0.1,
    body='{"a": 1}',
    tags=["a", "é"],
    big=2**62 + 1,
)


def delivery(value: Any, declared: Any = Change[Thing] | None, **options: Any) -> Delivery:
    app = App("copy", decode=Debezium())

    async def copied(change: Any) -> None: ...

    copied.__annotations__["change"] = declared
    app.handler("changes", **{"message_id": "field:id", **options})(copied)
    raw = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
    return Delivery(app.handlers["copied"], LogRecord("changes", 0, 0, 0, b"k", raw, ()))


def change_of(value: Any, declared: Any = Change[Thing] | None) -> Any:
    return decoded(delivery(value, declared))


def test_values_are_those_of_the_database() -> None:
    change = change_of(WITH_SCHEMAS[0])
    assert change.op == "r" or change.op == "c"
    assert change.after == ROW and str(change.after.price) == "12345678901234567890.1230"
    assert change.before is None and change.source["table"] == "things" and change.ts_ms > 0
    model = change_of(WITH_SCHEMAS[0], Change[ThingModel] | None)
    assert (model.after.price, model.after.at) == (ROW.price, ROW.at)
    assert change_of(WITH_SCHEMAS[0], Change[dict[str, Any]] | None).after["zoned"] == ROW.zoned


def test_text_from_the_connector_gives_the_same_values() -> None:
    """decimal.handling.mode=string, time.precision.mode=isostring, no schemas."""
    assert change_of(WITHOUT[0], Change[ThingModel] | None).after.price == ROW.price
    after = change_of(WITHOUT[0], Change[dict[str, Any]] | None).after
    assert after["price"] == "12345678901234567890.1230" and after["day"].startswith("2026-01-02")


@pytest.mark.parametrize("messages", [WITH_SCHEMAS, WITHOUT])
def test_an_update_a_delete_and_its_tombstone(messages: list[Any]) -> None:
    changes = [change_of(value, Change[dict[str, Any]] | None) for value in messages]
    assert [None if change is None else change.op for change in changes] == FIXTURES["ops"]
    update = next(change for change in changes if change is not None and change.op == "u")
    delete = next(change for change in changes if change is not None and change.op == "d")
    assert (update.before["flag"], update.after["flag"]) == (True, False)
    assert delete.after is None and delete.before["id"] == 1
    assert changes[-1] is None


def test_a_change_that_is_sent_again_has_the_same_id() -> None:
    """The connector was started twice from the same place (debezium.json: sent_again)."""
    first, again = FIXTURES["sent_again"]
    assert first and len(first) == len(again)
    for one, other in zip(first, again, strict=True):
        both = [delivery(one), delivery(other)]
        identify(both)
        assert both[0].id == both[1].id
        assert both[0].outcome is None
    ids = [delivery(value) for value in first]
    identify(ids)
    assert len({one.id for one in ids}) == len(first)


def test_rows_that_were_inserted_together_have_their_own_ids() -> None:
    """COPY writes many rows at one place of the log."""
    rows = [delivery(value) for value in FIXTURES["copied"]]
    identify(rows)
    assert len({json.loads(value)["payload"]["source"]["lsn"] for value in map(json.dumps, FIXTURES["copied"])}) < len(
        rows
    )
    assert len({one.id for one in rows}) == len(rows) > 2


def test_a_tombstone_is_none_and_has_the_id_of_its_offset() -> None:
    tombstone = delivery(None)
    assert identify([tombstone]) == {"changes"}
    assert tombstone.outcome is None and decoded(tombstone) is None


UNSENT = {"op": "u", "before": None, "after": {"id": 1, "body": "__debezium_unavailable_value"},
          "source": {"connector": "postgresql", "lsn": 5}}  # fmt: skip


class Needed(msgspec.Struct):
    id: int
    body: str


def test_a_column_that_was_not_sent_is_never_its_placeholder() -> None:
    assert change_of(UNSENT).after == Thing(id=1)
    schema = copy.deepcopy(WITH_SCHEMAS[0])
    schema["payload"]["after"]["body"] = "__debezium_unavailable_value"
    assert change_of(schema).after.body is None
    refused = delivery(UNSENT, Change[Needed] | None)
    identify([refused])
    assert isinstance(refused.outcome, Dead) and "missing required field `body`" in refused.outcome.error


PARTIAL = {"op": "d", "before": {"id": 1, "body": None}, "after": None, "source": {"connector": "postgresql", "lsn": 5}}
OTHER = {"op": "c", "before": None, "after": {"id": 1}, "source": {"connector": "mongodb"}}
PLAIN_NUMBERS = {"op": "c", "before": None, "after": {"id": 1, "at": 1767323045678901}, "source": {}}


@pytest.mark.parametrize(
    ("value", "declared", "reason", "says"),
    [
        (b"{}", Change[Thing] | None, Reason.UNREADABLE, "no change of Debezium"),
        ({"id": 1}, Change[Thing] | None, Reason.UNREADABLE, "drop decode=Debezium() and declare the row"),
        (b"\0\0\0\0\1abc", Change[Thing] | None, Reason.UNREADABLE, "for Avro, write decode=Debezium(Avro())"),
        ({**UNSENT, "op": "m"}, Change[Thing] | None, Reason.UNREADABLE, "no change of a row"),
        (PARTIAL, Change[Needed] | None, Reason.UNREADABLE, "set REPLICA IDENTITY FULL of the table"),
        (OTHER, Change[Thing] | None, Reason.NO_MESSAGE_ID, "the field 'id' is empty"),
        (PLAIN_NUMBERS, Change[Thing] | None, Reason.UNREADABLE, "Expected `datetime | null`, got `int`"),
    ],
)
def test_messages_that_are_no_changes_are_at_fault(value: Any, declared: Any, reason: Reason, says: str) -> None:
    refused = delivery(value, declared)
    identify([refused])
    assert isinstance(refused.outcome, Dead)
    assert (refused.outcome.reason, says in refused.outcome.error) == (reason, True), refused.outcome


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("io.debezium.time.Date", -1, date(1969, 12, 31)),
        ("io.debezium.time.Time", 1, time(0, 0, 0, 1000)),
        ("io.debezium.time.NanoTimestamp", 1_000, datetime(1970, 1, 1, 0, 0, 0, 1)),
        ("io.debezium.time.NanoTimestamp", 1_001, "nanoseconds"),
        ("io.debezium.time.MicroTimestamp", 2**62, "no MicroTimestamp of years 1 to 9999"),
        ("io.debezium.time.Timestamp", -1, datetime(1969, 12, 31, 23, 59, 59, 999000)),
        ("io.debezium.time.ZonedTimestamp", "10000-01-01T00:00:00Z", "no ZonedTimestamp"),
        ("io.debezium.time.Time", 86_400_000, "not within a day"),
        ("org.apache.kafka.connect.data.Timestamp", 0, datetime(1970, 1, 1, tzinfo=UTC)),
        ("org.apache.kafka.connect.data.Decimal", "/w==", Decimal("-0.01")),
        ("org.apache.kafka.connect.data.Decimal", "?", "not base64"),
    ],
)
def test_every_encoding_is_exact_or_refused(name: str, value: Any, expected: Any) -> None:
    column = {"field": "x", "name": name, "parameters": {"scale": "2"}, "type": "any"}
    schema = {"type": "struct", "fields": [{"field": "after", "type": "struct", "fields": [column]}]}
    payload = {"op": "c", "before": None, "after": {"x": value}, "source": {"connector": "postgresql", "lsn": 1}}
    one = delivery({"schema": schema, "payload": payload}, Change[dict[str, Any]] | None)
    identify([one])
    if isinstance(expected, str):
        assert isinstance(one.outcome, Dead) and expected in one.outcome.error
    else:
        assert decoded(one).after == {"x": expected}
