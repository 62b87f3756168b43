"""The copy of a dead letter: its id and its headers."""

from __future__ import annotations

import pytest

from consumer.core.message import Partition
from consumer.outbox.dead_letter_copy import StoredDeadLetter, copy_of
from consumer.outbox.record import headers_as_json, headers_from_json

pytestmark = pytest.mark.unit

LETTER = StoredDeadLetter(
    number=7, app="shop", handler=2, handler_name="settle", id=bytes(16), fingerprint=-5, topic="in", partition=1, offset=9,
    timestamp=99, reason="failed", kind="ValueError", attempts=3, key=None, value=None,
    header_names=[b"Message-Id", b"a", b"a", b"\xff", b"nul\0"], header_values=[b"m", b"\xff", None, b"x", b"x"],
)  # fmt: skip


def test_the_copy_has_the_original_and_where_it_came_from() -> None:
    copy = copy_of(LETTER, "dead")
    assert (copy.source, copy.handler, copy.offset) == (Partition("in", 1), 2, 9)
    record = copy.record
    assert (record.topic, record.key, record.value) == ("dead", None, None)
    assert record.headers[:3] == (("dead-letter-message-id", b"m"), ("a", b"\xff"), ("a", None))
    assert dict(record.headers[3:]) == {
        "dead-letter-id": b"shop/settle/7",
        "dead-letter-app": b"shop",
        "dead-letter-handler": b"settle",
        "dead-letter-topic": b"in",
        "dead-letter-partition": b"1",
        "dead-letter-offset": b"9",
        "dead-letter-timestamp": b"99",
        "dead-letter-reason": b"failed",
        "dead-letter-error": b"ValueError",
        "dead-letter-attempts": b"3",
        "dead-letter-altered": b"a header whose name is not UTF-8 was left out",
    }
    assert headers_from_json(headers_as_json(record.headers)) == record.headers


def test_its_id_is_of_the_message_and_the_handler_alone() -> None:
    ids = {
        copy_of(letter, "dead").record.id
        for letter in (
            LETTER,
            LETTER._replace(number=8, attempts=1, reason="rejected", offset=10),  # given up again, after a restore
            LETTER._replace(handler_name="book"),
            LETTER._replace(app="other"),
            LETTER._replace(fingerprint=5),
            LETTER._replace(id=bytes([1] * 16)),
        )
    }
    assert len(ids) == 5
