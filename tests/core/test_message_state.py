"""What became of a message, from what is stored of it."""

from __future__ import annotations

from typing import Any

import pytest

from consumer import App
from consumer.admin.tail import time_of
from consumer.admin.tail_messages import fault_in, id_text, in_time_order
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord, Partition
from consumer.core.message_state import StoredState, state_of
from consumer.transaction.identify import identify

pytestmark = pytest.mark.unit

HERE, ELSEWHERE = (Partition("t", 1), 5), (Partition("u", 0), 9)


def delivery(
    declared: Any = dict, value: bytes | None = b"{}", headers: dict[str, bytes] | None = None, **options: Any
) -> Delivery:
    """The message at HERE, identified."""
    app = App("shop")

    async def store(payload: Any) -> None: ...

    store.__annotations__["payload"] = declared
    app.handler("t", **options)(store)
    record = LogRecord("t", 1, 5, 1000, b"k", value, tuple((headers or {}).items()))
    message = Delivery(app.handlers["store"], record)
    identify([message])
    return message


@pytest.mark.parametrize(
    ("stored", "position", "expected"),
    [
        (StoredState("now", True, HERE), 6, "applied"),
        (StoredState("now", True, HERE), 3, "applied"),  # positions were moved back
        (StoredState("now", True, HERE, 4, "applied", "failed"), 6, "applied"),  # by a retry
        (StoredState(None, False, None, 4, "applied", "failed"), 6, "applied"),  # and the ledger has forgotten it
        (StoredState("now", False, ELSEWHERE, 4, "applied", "id_conflict"), 6, "applied"),
        (StoredState("now", True, ELSEWHERE), 6, "duplicate"),
        (StoredState("now", True, ELSEWHERE, 4, "applied", "failed"), 6, "duplicate"),
        (StoredState("now", True, ELSEWHERE), 5, "unsettled"),
        (StoredState("now", False, ELSEWHERE), 5, "unsettled"),  # a conflict, as soon as a worker sees it
        (StoredState("now", False, ELSEWHERE, 4, "dead", "id_conflict"), 6, "dead-lettered"),
        (StoredState(None, True, HERE, 4, "dead", "failed"), 6, "dead-lettered"),
        (StoredState(None, True, HERE, 4, "waiting", "behind"), 6, "waiting"),
        (StoredState(None, True, HERE, 4, "discarded", "failed"), 6, "discarded"),
        (StoredState(attempts=2), 5, "waiting"),
        (StoredState(attempts=2), 6, "unknown"),  # left over
        (StoredState(), 5, "unsettled"),
        (StoredState(), None, "unsettled"),
        (StoredState(), 6, "unknown"),
    ],
)
def test_the_state_of_a_message(stored: StoredState, position: int | None, expected: str) -> None:
    state = state_of(delivery(), stored, position, None)
    assert state.state == expected
    assert state.first == ("u:0:9" if stored.claimed_by == ELSEWHERE and stored.same_payload else None)


def test_a_handler_without_a_ledger_skips() -> None:
    message = delivery(idempotent=False)
    assert [state_of(message, StoredState(), position, None).state for position in (5, 6)] == ["unsettled", "skipped"]


@pytest.mark.parametrize(
    ("options", "headers", "value", "expected"),
    [
        ({}, {"message-id": b"o-7"}, b"{}", "o-7"),
        ({}, {}, b"{}", "t:1:5"),
        ({}, {"ce_id": b"1", "ce_source": b"/s"}, b"{}", "in hexadecimal"),
        ({"message_id": "header:x"}, {"x": b"\xff"}, b"{}", "\\xff"),
        ({"message_id": "header:x"}, {}, b"{}", "t:1:5"),
        ({"message_id": "field:a.b"}, {}, b'{"a": {"b": 7}}', "7"),
        ({"message_id": "field:a.b"}, {}, b"{}", "t:1:5"),
        ({"message_id": lambda value: value["a"]}, {}, b'{"a": "z"}', "z"),
        ({"message_id": "offset"}, {"message-id": b"o-7"}, b"{}", "t:1:5"),
    ],
)
def test_the_id_is_shown_as_its_producer_wrote_it(
    options: dict[str, Any], headers: dict[str, bytes], value: bytes, expected: str
) -> None:
    message = delivery(dict[str, Any], value, headers, **options)
    shown = id_text(message)
    assert shown == expected if "ce_id" not in headers else shown.replace("-", "") == message.id.hex()


def test_a_fault_of_form_is_named_before_a_worker_sees_it() -> None:
    assert fault_in(delivery(int, b"1")) is None
    assert fault_in(delivery(int, b'"x"')) == "unreadable: Expected `int`, got `str`"
    assert fault_in(delivery(int, None)) == "no_value: a null value, and the handler does not take None"


def test_a_timestamp_that_is_no_time_of_a_calendar_has_none() -> None:
    assert str(time_of(1764540000123)) == "2025-11-30 22:00:00.123000+00:00"
    assert time_of(-1) is None and time_of(1764540000123 * 1000) is None and time_of((1 << 63) - 1) is None


def test_partitions_are_merged_by_time_and_keep_their_order() -> None:
    def record(partition: int, offset: int, at: int) -> LogRecord:
        return LogRecord("t", partition, offset, at, None, None, ())

    records = [record(0, 1, 10), record(0, 2, 30), record(0, 3, 5), record(1, 1, 20), record(1, 2, 40)]
    assert [(one.partition, one.offset) for one in in_time_order(records)] == [(0, 1), (1, 1), (0, 2), (0, 3), (1, 2)]
