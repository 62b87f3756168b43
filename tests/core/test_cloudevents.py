"""A CloudEvent is identified by its source and its id together.

Binary and structured mode give the same id. An event whose id cannot be read is refused: it is never another producer's
event, and never a message without an id.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core import identity
from consumer.core.cloudevents import from_event
from consumer.core.errors import Unreadable
from consumer.core.message import LogRecord
from consumer.core.outcome import Reason

pytestmark = pytest.mark.unit

STRUCTURED = ("content-type", b"application/cloudevents+json")
TEXT = st.text(min_size=1, max_size=20)


def event(headers: Any, value: bytes | None = b"{}") -> LogRecord:
    return LogRecord("t", 0, 0, 0, None, value, tuple(headers), "")


def binary(source: str, id: str, prefix: str = "ce_") -> LogRecord:
    return event([(f"{prefix}source", source.encode()), ("other", b"x"), (f"{prefix}id", id.encode())])


def structured(body: object, content_type: bytes = STRUCTURED[1], name: str = "content-type") -> LogRecord:
    return event([(name, content_type)], json.dumps(body).encode())


@given(st.tuples(TEXT, TEXT), st.tuples(TEXT, TEXT))
def test_events_are_one_only_if_source_and_id_are(one: tuple[str, str], other: tuple[str, str]) -> None:
    first, second = from_event(binary(*one)), from_event(binary(*other))
    assert first is not None and len(first) == 16
    same_id = identity.message_id(one[1].encode()) == identity.message_id(other[1].encode())
    assert (first == second) == (one[0] == other[0] and same_id)


@pytest.mark.parametrize(("one", "other"), [(("/eu", "1"), ("/us", "1")), (("/a1", "1"), ("/a", "11"))])
def test_one_id_of_two_sources_is_two_events(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert from_event(binary(*one)) != from_event(binary(*other))
    assert from_event(binary(*one)) != identity.message_id(one[1].encode())


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/cloudevents+json",
        b"application/cloudevents+json; charset=UTF-8",
        b"Application/CloudEvents+JSON;charset=utf-8",
        b" application/cloudevents+json ",
        b'"application/cloudevents+json;charset=UTF-8"',
    ],
)
@pytest.mark.parametrize("name", ["content-type", "Content-Type", "contentType"])
def test_structured_and_binary_mode_give_one_id(content_type: bytes, name: str) -> None:
    body = {"specversion": "1.0", "id": "1", "source": "/eu", "type": "x", "data": {"id": "9"}}
    wanted = from_event(binary("/eu", "1"))
    assert from_event(structured(body, content_type, name)) == wanted
    assert from_event(binary("/eu", "1", "ce-")) == wanted
    with_mark = event([STRUCTURED], b"\xef\xbb\xbf" + json.dumps(body).encode())
    assert from_event(with_mark) == wanted


def test_a_uuid_as_the_id_of_an_event_has_all_its_spellings() -> None:
    uuid = "0190a5c1-7ab4-7c3e-8f00-1234567890ab"
    assert from_event(binary("/eu", uuid)) == from_event(binary("/eu", uuid.upper().replace("-", "")))


@pytest.mark.parametrize(
    "headers", [[], [("ce_source", b"/eu")], [("content-type", b"application/json")], [("CE_ID", b"1")]]
)
def test_a_record_without_an_event_has_no_id_of_one(headers: Any) -> None:
    assert from_event(event(headers)) is None


def test_a_deletion_in_structured_mode_is_no_event() -> None:
    assert from_event(event([STRUCTURED], None)) is None


def test_attributes_repeated_with_equal_values_count_once() -> None:
    twice = event([("ce_id", b"1"), ("ce_source", b"/eu"), ("ce_id", b"1"), ("ce-source", b"/eu")])
    assert from_event(twice) == from_event(binary("/eu", "1"))


REFUSED: list[tuple[LogRecord, Reason, str]] = [
    (event([("ce_id", b"1")]), Reason.NO_MESSAGE_ID, r"without 'ce_source'.*message_id=\"header:ce_id\""),
    (event([("ce_id", b"1"), ("ce_source", b"")]), Reason.NO_MESSAGE_ID, "'ce_source' is empty"),
    (event([("ce_id", b"1"), ("ce_source", None)]), Reason.NO_MESSAGE_ID, "'ce_source' is empty"),
    (event([("ce_id", b""), ("ce_source", b"/eu")]), Reason.NO_MESSAGE_ID, "'ce_id' is empty"),
    (
        event([("ce_id", b"1"), ("ce-id", b"2"), ("ce_source", b"/eu")]),
        Reason.AMBIGUOUS_MESSAGE_ID,
        "several 'ce_id'",
    ),
    (
        event([("ce_id", b"1"), ("ce_source", b"/eu"), ("ce_source", b"/us")]),
        Reason.AMBIGUOUS_MESSAGE_ID,
        "several 'ce_source'",
    ),
    (structured({"id": "1"}), Reason.NO_MESSAGE_ID, "without the text fields"),
    (structured({"id": 1, "source": "/eu"}), Reason.NO_MESSAGE_ID, "without the text fields"),
    (structured({"id": "", "source": "/eu"}), Reason.NO_MESSAGE_ID, "empty"),
    (structured([]), Reason.NO_MESSAGE_ID, "without the text fields"),
    (event([STRUCTURED], b"CANARY"), Reason.UNREADABLE, "not JSON"),
    (
        structured([{"id": "1", "source": "/eu"}], b"application/cloudevents-batch+json"),
        Reason.NO_MESSAGE_ID,
        "one event in each",
    ),
    (structured({}, b"application/cloudevents+avro"), Reason.NO_MESSAGE_ID, "not JSON"),
]


@pytest.mark.parametrize(("record", "reason", "says"), REFUSED)
def test_an_event_whose_id_cannot_be_read_is_refused_in_one_line(record: LogRecord, reason: Reason, says: str) -> None:
    with pytest.raises(Unreadable, match=says) as caught:
        from_event(record)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value) and "CANARY" not in str(caught.value)
