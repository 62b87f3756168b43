"""A declared id becomes the same 16 bytes on every delivery, whatever its length, bytes or a UUID's case, and two ids
that differ become different ones; the bytes never change between releases, because the ledger holds them. An id that
is absent, empty, repeated or of an unusable type is refused with its reason; a rule that is none of the forms is
refused at registration.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.core import identity
from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.identity import CallableId, DefaultId, FieldId, HeaderId, OffsetId
from consumer.core.message import LogRecord
from consumer.core.outcome import Reason

UUID_TEXT = b"0190a5c1-7ab4-7c3e-8f00-1234567890ab"
UUID_TEXTS = st.uuids().map(lambda each: str(each).encode())
RAW_IDS = st.binary(max_size=80) | UUID_TEXTS | st.uuids().map(lambda each: each.bytes)
NEAR_ME = (
    bytes,
    bytes.upper,
    bytes.swapcase,
    lambda raw: raw + b" ",
    lambda raw: raw[:-1] + b"g",
    lambda raw: b"\0" + raw,
)
NEAR_IDS = st.tuples(RAW_IDS, st.sampled_from(NEAR_ME)).map(lambda pair: (pair[0], pair[1](pair[0])))
TOPICS = st.text("abcAB019._-", min_size=1, max_size=36)
PLACES = st.tuples(TOPICS, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))
NEAR_PLACES = st.tuples(st.sampled_from(["a", "a1", "a-1"]), st.integers(0, 120), st.integers(0, 120))


def record(topic: str = "t", partition: int = 0, offset: int = 0, headers: Any = (), value: bytes = b"") -> LogRecord:
    return LogRecord(topic, partition, offset, 0, None, value, headers, "")


def folded(raw: bytes) -> bytes:
    """The raw id with a UUID's case taken out, by the standard library's own reading of a UUID."""
    try:
        text = raw.decode("ascii")
        return str(UUID(text)).encode() if str(UUID(text)) == text.lower() else raw
    except ValueError:
        return raw


@given(NEAR_IDS | st.tuples(RAW_IDS, RAW_IDS))
@example((UUID_TEXT, UUID_TEXT.replace(b"-", b"")))
@example((b"x" * 10**6, b"x" * (10**6 - 1) + b"y"))
def test_two_ids_are_one_key_only_if_they_are_one_text_or_one_uuid_in_two_cases(pair: tuple[bytes, bytes]) -> None:
    one, other = pair
    first, second = identity.message_id(one), identity.message_id(other)
    assert len(first) == len(second) == 16
    assert (first == second) == (folded(one) == folded(other))


@given(st.uuids())
def test_a_uuid_keeps_its_own_bytes_in_either_case_and_as_a_uuid_object(each: UUID) -> None:
    assert identity.message_id(str(each).encode()) == each.bytes
    assert identity.message_id(str(each).upper().encode()) == each.bytes
    assert identity.from_object(each, "it") == each.bytes


def test_the_keys_in_the_ledger_of_an_older_release_still_fit() -> None:
    assert identity.message_id(b"payment-1").hex() == "5c1cd1393f15d40ec7f2f53e4bba3a8f"
    assert identity.offset_id(record("payments", 3, 42)).hex() == "fd90d12710904d8989d3556d335a44f7"
    assert identity.fingerprint(b"payment-1") == -5892511908779253874


@given(st.one_of(PLACES, NEAR_PLACES), st.one_of(PLACES, NEAR_PLACES))
@example(("a1", 1, 1), ("a", 11, 1))
@example(("a", 1, 11), ("a", 11, 1))
def test_an_offset_id_belongs_to_one_place_in_the_log(one: Any, other: Any) -> None:
    first, second = identity.offset_id(record(*one)), identity.offset_id(record(*other))
    assert (first == second) == (one == other)


@given(st.binary(), st.binary())
def test_a_fingerprint_tells_payloads_apart_and_fits_a_bigint(one: bytes, other: bytes) -> None:
    assert (identity.fingerprint(one) == identity.fingerprint(other)) == (one == other)
    assert -(2**63) <= identity.fingerprint(one) < 2**63


def test_no_payload_and_an_empty_payload_are_two_things() -> None:
    assert identity.fingerprint(None) == identity.NO_VALUE_FINGERPRINT != identity.fingerprint(b"")


def test_the_header_of_that_very_name_is_the_id() -> None:
    headers = (("Message-Id", b"no"), ("message-id", b"yes"), ("ce_id", b"no"))
    assert identity.from_headers(record(headers=headers), "message-id") == identity.message_id(b"yes")
    assert identity.from_headers(record(headers=headers), "absent") is None


@pytest.mark.parametrize("values", [[b""], [None], [b"a", b"a"], [b"a", b"b"], [None, b"a"], [b"a", b""]], ids=repr)
def test_an_empty_or_repeated_header_is_refused(values: list[bytes | None]) -> None:
    with pytest.raises(Unreadable, match="'message-id'") as caught:
        identity.from_headers(record(headers=tuple(("message-id", each) for each in values)), "message-id")
    assert caught.value.reason == (Reason.AMBIGUOUS_MESSAGE_ID if len(values) > 1 else Reason.NO_MESSAGE_ID)


class Inner(msgspec.Struct):
    ids: dict[str, Any]


@dataclasses.dataclass
class Outer:
    inner: Inner


@pytest.mark.parametrize("nested", [lambda x: Outer(Inner({"id": x})), lambda x: {"inner": {"ids": {"id": x}}}])
@pytest.mark.parametrize(
    ("found", "raw"), [("7", b"7"), (0, b"0"), (-1, b"-1"), (b"\xff", b"\xff"), ("\udcff", b"\xed\xb3\xbf")]
)
def test_a_field_is_reached_through_attributes_and_keys(nested: Any, found: object, raw: bytes) -> None:
    rule = FieldId(("inner", "ids", "id"))
    assert identity.from_value(rule, nested(found)) == identity.message_id(raw)


@pytest.mark.parametrize("value", [{}, {"a": None}, {"a": {}}, {"a": "text"}, {"a": {"b": 1}}, None, [1]], ids=repr)
def test_a_path_that_leads_nowhere_is_no_id(value: object) -> None:
    with pytest.raises(Unreadable, match=r"no field 'a\.b\.c'") as caught:
        identity.from_value(FieldId(("a", "b", "c")), value)
    assert caught.value.reason == Reason.NO_MESSAGE_ID


@pytest.mark.parametrize("found", [None, "", b"", True, False, 1.0, [], {}, ("a",)], ids=repr)
def test_a_value_that_is_no_id_is_refused_wherever_it_comes_from(found: object) -> None:
    for rule in (FieldId(("id",)), CallableId(lambda value: value["id"])):
        with pytest.raises(Unreadable) as caught:
            identity.from_value(rule, {"id": found})
        assert caught.value.reason == Reason.NO_MESSAGE_ID


def test_a_function_gives_the_id_and_its_failure_is_named_without_its_text() -> None:
    assert identity.from_value(CallableId(lambda value: value + 1), 6) == identity.message_id(b"7")
    with pytest.raises(Unreadable, match="KeyError") as caught:
        identity.from_value(CallableId(lambda value: value["canary"]), {})
    assert caught.value.reason == Reason.NO_MESSAGE_ID and "canary" not in str(caught.value)


def test_each_form_of_a_rule_is_read() -> None:
    assert identity.parse_rule(None) == DefaultId()
    assert identity.parse_rule("offset") == OffsetId()
    assert identity.parse_rule("header:x:y") == HeaderId("x:y")
    assert identity.parse_rule("field:a.b") == FieldId(("a", "b"))
    assert identity.parse_rule(len) == CallableId(len)


BAD = [
    "",
    "header",
    "header:",
    "field:",
    "field:.a",
    "field:a.",
    "field:a..b",
    "Header:x",
    "id",
    "offset:1",
    7,
    b"offset",
]


@pytest.mark.parametrize("option", BAD, ids=repr)
def test_anything_else_is_refused_with_the_forms_there_are(option: object) -> None:
    with pytest.raises(RegistrationError, match=r"header:NAME.*field:path\.to.*offset"):
        identity.parse_rule(option)
