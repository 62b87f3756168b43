"""Outgoing records: stable ids, exact bytes, clear refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import TransactionMisuse
from consumer.core.identity import from_headers, message_id
from consumer.core.message import LogRecord
from consumer.outbox.record import (
    MESSAGE_ID,
    OutgoingRecord,
    check_size,
    check_topic,
    checked_headers,
    derived_id,
    encoded_key,
    encoded_value,
    event_type,
    given_id,
    headers_as_json,
    headers_from_json,
    size_of,
    trace_of,
    wire_headers,
)

pytestmark = pytest.mark.unit

ID = bytes(range(16))
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_derived_id_never_changes() -> None:
    """Readers of the topic store it for ever.

    This value may not change in any release.
    """
    assert derived_id("billing", "settle", ID, 0).hex() == "2889f83022edaa7830e4552d5c39e838"


fields = st.tuples(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 200),
)


@given(fields, fields)
def test_different_inputs_never_share_an_id(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert (derived_id(*one) == derived_id(*other)) == (one == other)


def test_the_boundary_between_fields_counts() -> None:
    assert derived_id("a", "bc", ID, 1) != derived_id("ab", "c", ID, 1)


def test_a_reader_of_the_topic_gets_the_same_sixteen_bytes() -> None:
    record = OutgoingRecord("t", derived_id("a", "h", ID, 3), None, b"x")
    read = LogRecord("t", 0, 0, 0, None, b"x", tuple(wire_headers(record)))
    assert from_headers(read, MESSAGE_ID) == record.id


@given(st.one_of(st.uuids(), st.text(st.characters(codec="utf-8"), min_size=1), st.integers(), st.binary(min_size=1)))
def test_a_given_id_is_the_one_that_its_header_means(id: object) -> None:
    raw = given_id(id)
    assert message_id(str(UUID(bytes=raw)).encode()) == raw


@pytest.mark.parametrize("id", ["", b"", 1.5, True, object()])
def test_invalid_outgoing_id_is_refused(id: object) -> None:
    with pytest.raises(TransactionMisuse, match="id="):
        given_id(id)


class Struct(msgspec.Struct):
    name: str
    amount: int


class Model(pydantic.BaseModel):
    name: str
    amount: int


@dataclasses.dataclass
class Data:
    name: str
    amount: int


@pytest.mark.parametrize("value", [Struct("é", 1), Model(name="é", amount=1), Data("é", 1), {"name": "é", "amount": 1}])
def test_values_become_json(value: object) -> None:
    assert json.loads(encoded_value(value) or b"") == {"name": "é", "amount": 1}


def test_a_pydantic_model_may_be_inside_of_a_value() -> None:
    value = {"lines": [Model(name="é", amount=1)], "first": Struct("a", 2)}
    assert encoded_value(value) == '{"lines":[{"name":"é","amount":1}],"first":{"name":"a","amount":2}}'.encode()


def test_bytes_and_text_stay_and_none_is_a_tombstone() -> None:
    assert [encoded_value(value) for value in (b"\xff", bytearray(b"a"), "é", None)] == [
        b"\xff",
        b"a",
        b"\xc3\xa9",
        None,
    ]
    assert [encoded_key(key) for key in (b"\xff", memoryview(b"a"), "é", None)] == [b"\xff", b"a", b"\xc3\xa9", None]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": math.nan}, "not finite"),
        ([math.inf], "not finite"),
        (Struct("x", math.nan), "not finite"),  # type: ignore[arg-type]
        (object(), "cannot become JSON"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_value_that_json_cannot_hold_is_refused_without_quoting_it(value: object, says: str) -> None:
    with pytest.raises(TransactionMisuse, match=says):
        encoded_value(value)


def test_a_key_of_another_type_is_refused() -> None:
    with pytest.raises(TransactionMisuse, match="key= is a value of type int"):
        encoded_key(7)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"message-id": "x"}, "reserved; use id="),
        ([("Message-ID", b"x")], "reserved"),
        ({"": "x"}, "no name"),
        ({7: "x"}, "no name"),
        ({"a": 7}, "'a' is a value of type int"),
        ({"a": "\ud800"}, "lone surrogate"),
        ({"\ud800": "x"}, "lone surrogate"),
        ({"a\0": "x"}, "NUL"),
        ([1], "no mapping"),
        (7, "no mapping"),
    ],
)
def test_bad_headers_are_refused(headers: object, says: str) -> None:
    with pytest.raises(TransactionMisuse, match=says):
        checked_headers(headers)  # type: ignore[arg-type]


header_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=10).filter(
    lambda name: name.lower() != "message-id"
)


@given(
    st.lists(
        st.tuples(header_names, st.one_of(st.none(), st.binary(max_size=20), st.text(st.characters(codec="utf-8"))))
    )
)
def test_headers_survive_postgresql_byte_for_byte(pairs: list[Any]) -> None:
    headers = checked_headers(pairs)
    assert headers == tuple((name, value.encode() if isinstance(value, str) else value) for name, value in pairs)
    text = headers_as_json(headers)
    assert headers_from_json(text) == headers
    assert "\\u0000" not in text  # jsonb refuses it


def test_an_undeclared_topic_is_refused() -> None:
    assert check_topic("a", {"a": 5}) == 5
    for topic in ("b", "no topic", 7, None, ["a"]):
        with pytest.raises(TransactionMisuse, match="is not declared; add it to App"):
            check_topic(topic, {"a": 5})


def test_a_record_that_kafka_would_refuse_is_refused() -> None:
    record = OutgoingRecord("t", ID, b"k", b"x" * 1000)
    check_size(record, size_of(record))
    with pytest.raises(TransactionMisuse, match=r"a record of 1,\d+ bytes is too large for t, which takes 1,000;"):
        check_size(record, 1000)


@given(st.lists(st.tuples(header_names, st.binary(max_size=20)), max_size=3), st.binary(max_size=300))
def test_the_size_is_at_least_that_of_the_record_batch(pairs: list[Any], value: bytes) -> None:
    from aiokafka.record.default_records import DefaultRecordBatchBuilder

    record = OutgoingRecord("t", ID, b"key", value, checked_headers(pairs), TRACE)
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, 0, 1 << 20)
    builder.append(0, 1_700_000_000_000, record.key, record.value, wire_headers(record))
    assert len(builder.build()) <= size_of(record) <= len(builder.build()) + 50 + 10 * len(pairs)


def test_the_trace_of_the_input_goes_on() -> None:
    headers = [("traceparent", TRACE.encode()), ("tracestate", b"a=1"), ("traceparent", b"other")]
    assert trace_of(headers) == (TRACE, "a=1")
    record = OutgoingRecord("t", ID, None, b"", (), *trace_of(headers))
    assert wire_headers(record)[1:] == [("traceparent", TRACE.encode()), ("tracestate", b"a=1")]


@pytest.mark.parametrize("value", [None, b"", b"garbage", TRACE.upper().encode(), b"00-\xff"])
def test_a_malformed_trace_is_left_out(value: bytes | None) -> None:
    assert trace_of([("traceparent", value), ("tracestate", b"a=1")]) == (None, None)


def test_the_event_type_is_the_header_as_text() -> None:
    assert event_type((("a", b"1"), ("ce_type", b"booked"))) == "booked"
    assert event_type((("ce_type", None),)) is None
    assert event_type((("ce_type", b"\xff"),)) is None
