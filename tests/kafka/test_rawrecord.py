"""Records come out of a batch as they were put in.

Offsets, timestamps, null and empty keys and values, headers in order, and header keys that are not UTF-8. A batch cut off at
the end of a fetch is left out, and bytes that are no records raise only ValueError.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import Any

import pytest
from aiokafka.codec import gzip_decode
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import encode_varint
from hypothesis import given
from hypothesis import strategies as st

from consumer.kafka import record_batch
from consumer.kafka.record_batch import BatchHeader, RawRecord

pytestmark = pytest.mark.unit

BYTES = st.none() | st.binary(max_size=200)
HEADERS = st.lists(st.tuples(st.text(max_size=8), BYTES), max_size=4)
RECORDS = st.lists(st.tuples(st.integers(0, 2**42), BYTES, BYTES, HEADERS), min_size=1, max_size=6)
BASES = st.integers(0, 2**62)
ATTRIBUTES = 21  # position of the field in a batch
LAST_OFFSET_DELTA = 23


def batch(records: Any, base: int = 0, codec: int = 0, attributes: int = 0) -> bytes:
    """A batch of aiokafka's producer, with what a broker fills in."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 30)
    for delta, (timestamp, key, value, headers) in enumerate(records):
        assert builder.append(delta, timestamp, key, value, headers)
    built = bytearray(builder.build())
    struct.pack_into(">q", built, 0, base)
    built[ATTRIBUTES + 1] |= attributes
    return bytes(built)


def by_hand(headers: list[tuple[bytes | None, bytes | None]], value: bytes = b"v") -> bytes:
    """A batch of one record, with header keys as bytes.

    No client builds one that is not UTF-8.
    """

    def field(content: bytes | None) -> bytes:
        return number(-1) if content is None else number(len(content)) + content

    def number(n: int) -> bytes:
        out = bytearray()
        encode_varint(n, out.append)
        return bytes(out)

    body = b"\0" + number(0) + number(0) + field(None) + field(value) + number(len(headers))
    body += b"".join(field(name) + field(content) for name, content in headers)
    body = number(len(body)) + body
    fixed = struct.pack(">iBIhiqqqhii", -1, 2, 0, 0, 0, 5, 5, -1, -1, -1, 1)
    return struct.pack(">qi", 0, len(fixed) + len(body)) + fixed + body


def read(log: bytes) -> list[RawRecord]:
    return [entry for header, body in record_batch.batches(log) for entry in record_batch.entries(header, body)]


def expected(records: Any, base: int = 0) -> list[RawRecord]:
    return [
        RawRecord(base + n, time, key, value, tuple(headers)) for n, (time, key, value, headers) in enumerate(records)
    ]


@given(st.lists(st.tuples(BASES, RECORDS), max_size=4))
def test_records_of_several_batches_come_out_as_they_were_put_in(parts: Any) -> None:
    log = b"".join(batch(records, base) for base, records in parts)
    assert read(log) == [entry for base, records in parts for entry in expected(records, base)]
    assert [header.last_offset for header, _ in record_batch.batches(log)] == [b + len(r) - 1 for b, r in parts]


@given(RECORDS, RECORDS, st.data())
def test_a_batch_cut_off_at_the_end_of_a_fetch_is_left_out(whole: Any, cut: Any, data: st.DataObject) -> None:
    tail = batch(cut, len(whole))
    length = data.draw(st.integers(0, len(tail) - 1))
    assert read(batch(whole) + tail[:length]) == expected(whole)


@given(RECORDS)
def test_the_brokers_time_stands_for_all_records_of_its_batch(records: Any) -> None:
    latest = max(time for time, *_ in records)
    assert [entry.timestamp for entry in read(batch(records, attributes=0x08))] == [latest] * len(records)


def test_a_compressed_batch_names_its_codec_and_keeps_its_records_packed() -> None:
    records = [(n, b"k" * 50, b"v" * 500, [("h", b"x")]) for n in range(20)]
    [(header, body)] = record_batch.batches(batch(records, base=7, codec=1))
    assert header.codec == 1
    assert list(record_batch.entries(header, gzip_decode(body))) == expected(records, 7)


@pytest.mark.parametrize("bits", [0x10, 0x20, 0x30])  # transactional, control
def test_other_attributes_are_not_taken_for_a_codec_or_a_clock(bits: int) -> None:
    [(header, _)] = record_batch.batches(batch([(1, None, None, [])], attributes=bits))
    assert (header.codec, header.log_append_time) == (0, False)


def test_records_removed_by_compaction_leave_gaps_and_the_last_offset() -> None:
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 20)
    for delta in (2, 5):
        builder.append(delta, 1, None, b"v", [])
    built = bytearray(builder.build())
    struct.pack_into(">q", built, 0, 100)
    struct.pack_into(">i", built, LAST_OFFSET_DELTA, 9)
    [(header, body)] = record_batch.batches(bytes(built))
    assert [entry.offset for entry in record_batch.entries(header, body)] == [102, 105]
    assert header.last_offset == 109


@given(st.lists(st.tuples(st.binary(max_size=8), BYTES), max_size=5), st.binary())
def test_a_header_key_of_any_bytes_is_kept_byte_for_byte(headers: Any, value: bytes) -> None:
    [entry] = read(by_hand(headers, value))
    assert [(name.encode("utf-8", "surrogateescape"), content) for name, content in entry.headers] == headers
    assert entry.value == value


def test_a_null_header_key_is_an_empty_one() -> None:
    assert read(by_hand([(None, b"x")]))[0].headers == (("", b"x"),)


def test_a_batch_of_an_older_format_ends_the_reading() -> None:
    good = batch([(1, None, b"v", [])])
    assert read(good + good[:16] + b"\1" + good[17:] + good) == read(good)


@given(st.binary(max_size=60), st.integers(-1, 5))
def test_bytes_that_are_no_records_raise_nothing_but_value_error(body: bytes, count: int) -> None:
    try:
        entries = list(record_batch.entries(BatchHeader(0, 0, 0, False, 0, 0, 0, count), body))
    except ValueError:
        return
    assert len(entries) == max(count, 0)


@given(RECORDS, st.data())
def test_a_body_cut_anywhere_raises(records: Any, data: st.DataObject) -> None:
    [(header, body)] = record_batch.batches(batch(records))
    with pytest.raises(ValueError):
        list(record_batch.entries(header, body[: data.draw(st.integers(0, len(body) - 1))]))


@pytest.mark.parametrize("by", [-1, 1])
def test_a_record_whose_length_does_not_fit_its_content_raises(by: int) -> None:
    [(header, body)] = record_batch.batches(by_hand([(b"a", b"b")]))
    with pytest.raises(ValueError):
        list(record_batch.entries(header, bytes([body[0] + 2 * by]) + body[1:] + b"\0"))


@pytest.mark.parametrize("length", [-12, -13, 0])
def test_a_batch_shorter_than_its_own_header_ends_the_reading(length: int) -> None:
    bad = bytearray(batch([(1, None, b"v", [])]))
    struct.pack_into(">i", bad, 8, length)
    assert list(islice(record_batch.batches(bytes(bad)), 3)) == []
