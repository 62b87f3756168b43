"""A declared id becomes the same 16 bytes on every delivery.

That holds for any length, any bytes and either case of a UUID; different ids become different bytes. The bytes never change
between releases, because the ledger holds them. An id that is absent, empty, repeated or of an unusable type is refused
with its reason; a rule of unknown form is refused at registration.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any
from uuid import RFC_4122, UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.core import identity
from consumer.core.errors import RegistrationError, Unreadable
from consumer.core.identity import CallableId, DefaultId, FieldId, HeaderId, OffsetId
from consumer.core.message import LogRecord
from consumer.core.outcome import Reason

pytestmark = pytest.mark.unit

UUID_TEXT = b"0190a5c1-7ab4-7c3e-8f00-1234567890ab"
UUID_TEXTS = st.uuids().map(lambda id: str(id).encode())
RAW_IDS = st.binary(max_size=80) | UUID_TEXTS | st.uuids().map(lambda id: id.bytes)
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
    """The raw id, or the UUID that it spells.

    The standard library decides what spells a UUID.
    """
    if len(raw) == 16:
        uuid = UUID(bytes=raw)
        return str(uuid).encode() if uuid.variant == RFC_4122 and uuid.version in range(1, 9) else raw
    try:
        text = raw.decode("ascii").strip().lower().removeprefix("urn:uuid:")
        text = text[1:-1] if text[:1] + text[-1:] in ("{}", '""') else text
        uuid = UUID(text)
        return str(uuid).encode() if text in (str(uuid), uuid.hex) else raw
    except ValueError:
        return raw


@given(NEAR_IDS | st.tuples(RAW_IDS, RAW_IDS))
@example((UUID_TEXT, UUID_TEXT.replace(b"-", b"")))
@example((b"x" * 10**6, b"x" * (10**6 - 1) + b"y"))
def test_two_ids_are_one_key_only_if_they_are_one_text_or_one_uuid(pair: tuple[bytes, bytes]) -> None:
    one, other = pair
    first, second = identity.message_id(one), identity.message_id(other)
    assert len(first) == len(second) == 16
    assert (first == second) == (folded(one) == folded(other))


SPELLINGS: list[Callable[[UUID], bytes]] = [
    lambda uuid: str(uuid).encode(),
    lambda uuid: uuid.hex.encode(),
    lambda uuid: uuid.hex.upper().encode(),
    lambda uuid: uuid.urn.encode(),
    lambda uuid: uuid.urn.upper().encode(),
    lambda uuid: b"urn:uuid:" + uuid.hex.encode(),
    lambda uuid: b"{%s}" % str(uuid).encode(),
    lambda uuid: b'"%s"' % str(uuid).encode(),
    lambda uuid: b'"%s"' % uuid.hex.upper().encode(),
    lambda uuid: b"{%s}" % str(uuid).upper().encode(),
    lambda uuid: b"{%s}" % uuid.hex.encode(),
    lambda uuid: b" %s\n" % str(uuid).encode(),
]


@given(st.uuids(), st.sampled_from(SPELLINGS))
def test_every_spelling_of_a_uuid_is_that_uuid_wherever_it_comes_from(id: UUID, spelling: Any) -> None:
    raw = spelling(id)
    assert identity.message_id(raw) == id.bytes
    assert identity.from_headers(record(headers=(("x", raw),)), "x") == id.bytes
    for spelled in (raw, raw.decode(), id):
        assert identity.from_object(spelled, "it") == id.bytes
    assert identity.ids_of_text(raw) == (id.bytes,)


@given(st.uuids(version=4) | st.uuids(version=1))
def test_the_sixteen_bytes_of_a_uuid_are_that_uuid(id: UUID) -> None:
    assert identity.message_id(id.bytes) == id.bytes


@pytest.mark.parametrize(
    "raw",
    [
        b"{0190a5c1-7ab4-7c3e-8f00-1234567890ab",
        b"0190a5c1-7ab4-7c3e-8f00-1234567890ab}",
        b"uuid:0190a5c1-7ab4-7c3e-8f00-1234567890ab",
        b"0190-a5c1-7ab4-7c3e-8f00-1234-5678-90ab",
        b"0190a5c1-7ab4-7c3e-8f00-1234567890ag",
        b"payment-00000001",
        b"\x01" * 16,
    ],
)
def test_text_that_resembles_a_uuid_is_an_id_of_its_own(raw: bytes) -> None:
    assert identity.message_id(raw) == hashlib.blake2b(raw, digest_size=16).digest()


@given(PLACES, st.none() | st.binary(min_size=16, max_size=16))
def test_declared_id_never_equals_an_offset_id(place: Any, salt: bytes | None) -> None:
    raw = "{}:{}:{}".format(*place).encode() + (salt or b"")
    assert identity.message_id(raw) != identity.offset_id(record(*place), salt)
    assert identity.from_object(raw, "it") != identity.offset_id(record(*place), salt)
    assert identity.message_id(raw) != identity.message_id(raw + b"0")


def test_a_text_of_a_person_stands_for_all_ids_that_it_may_mean() -> None:
    place, salt = record("payments", 3, 42), b"s" * 16
    assert identity.ids_of_text("payments:3:42", [None, salt]) == (
        identity.message_id(b"payments:3:42"),
        identity.offset_id(place),
        identity.offset_id(place, salt),
    )
    assert identity.ids_of_text("edit-of-dead-letter-7")[1] == identity.edit_id(7)
    assert identity.edit_id(7) != identity.message_id(b"edit-of-dead-letter-7")
    assert identity.ids_of_text("payment-1") == (identity.message_id(b"payment-1"),)


@given(st.uuids())
def test_a_uuid_keeps_its_own_bytes_in_either_case_and_as_a_uuid_object(id: UUID) -> None:
    assert identity.message_id(str(id).encode()) == id.bytes
    assert identity.message_id(str(id).upper().encode()) == id.bytes
    assert identity.from_object(id, "it") == id.bytes


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
def test_fingerprints_of_different_payloads_differ_and_fit_a_bigint(one: bytes, other: bytes) -> None:
    assert (identity.fingerprint(one) == identity.fingerprint(other)) == (one == other)
    assert -(2**63) <= identity.fingerprint(one) < 2**63


def test_missing_payload_and_empty_payload_differ() -> None:
    assert identity.fingerprint(None) == identity.NO_VALUE_FINGERPRINT != identity.fingerprint(b"")


def test_the_header_of_that_very_name_is_the_id() -> None:
    headers = (("Message-Id", b"no"), ("message-id", b"yes"), ("ce_id", b"no"))
    assert identity.from_headers(record(headers=headers), "message-id") == identity.message_id(b"yes")
    assert identity.from_headers(record(headers=headers), "absent") is None


@pytest.mark.parametrize(
    "values",
    [[b""], [None], [b"", b""], [None, None], [b"a", b"b"], [None, b"a"], [b"a", b""], [b"a", b"a", b"b"]],
    ids=repr,
)
def test_an_empty_header_or_two_that_differ_are_refused(values: list[bytes | None]) -> None:
    with pytest.raises(Unreadable, match="'message-id'") as caught:
        identity.from_headers(record(headers=tuple(("message-id", value) for value in values)), "message-id")
    several = len(set(values)) > 1
    assert caught.value.reason == (Reason.AMBIGUOUS_MESSAGE_ID if several else Reason.NO_MESSAGE_ID)


@pytest.mark.parametrize("values", [[b"a", b"a"], [b"a"] * 3, [UUID_TEXT, UUID_TEXT.upper()]], ids=repr)
def test_a_header_repeated_with_one_id_is_that_id(values: list[bytes]) -> None:
    headers = tuple(("message-id", value) for value in values)
    assert identity.from_headers(record(headers=headers), "message-id") == identity.message_id(values[0])


class Inner(msgspec.Struct):
    ids: dict[str, Any]


@dataclasses.dataclass
class Outer:
    inner: Inner


@pytest.mark.parametrize("nested", [lambda x: Outer(Inner({"id": x})), lambda x: {"inner": {"ids": {"id": x}}}])
@pytest.mark.parametrize(
    ("value", "raw"), [("7", b"7"), (0, b"0"), (-1, b"-1"), (b"\xff", b"\xff"), ("\udcff", b"\xed\xb3\xbf")]
)
def test_a_field_is_reached_through_attributes_and_keys(nested: Any, value: object, raw: bytes) -> None:
    rule = FieldId(("inner", "ids", "id"))
    assert identity.from_value(rule, nested(value)) == identity.message_id(raw)


@pytest.mark.parametrize("value", [{}, {"a": None}, {"a": {}}, {"a": "text"}, {"a": {"b": 1}}, None, [1]], ids=repr)
def test_a_path_that_leads_nowhere_is_no_id(value: object) -> None:
    with pytest.raises(Unreadable, match=r"no field 'a\.b\.c'") as caught:
        identity.from_value(FieldId(("a", "b", "c")), value)
    assert caught.value.reason == Reason.NO_MESSAGE_ID


@pytest.mark.parametrize("no_id", [None, "", b"", True, False, 1.0, [], {}, ("a",)], ids=repr)
def test_a_value_that_is_no_id_is_refused_wherever_it_comes_from(no_id: object) -> None:
    for rule in (FieldId(("id",)), CallableId(lambda value: value["id"])):
        with pytest.raises(Unreadable) as caught:
            identity.from_value(rule, {"id": no_id})
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
def test_unknown_option_is_refused_with_the_forms_there_are(option: object) -> None:
    with pytest.raises(RegistrationError, match=r"header:NAME.*field:path\.to.*offset"):
        identity.parse_rule(option)
