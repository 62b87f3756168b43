"""Keys of requests to other systems: one for each request."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import Message, TransactionMisuse
from consumer.core.idempotency import idempotency_key

pytestmark = pytest.mark.unit

ID = bytes(range(16))
FIELDS = st.tuples(st.text(max_size=6), st.text(max_size=6), st.binary(max_size=16), st.text(max_size=6))


def test_the_key_never_changes_between_releases() -> None:
    """Other systems remember it."""
    assert idempotency_key("billing", "settle", ID, "charge") == "9330f1ddb3871d69d7f802e4f783c8dd"


@given(FIELDS)
def test_a_key_is_32_hexadecimal_digits(fields: tuple[str, str, bytes, str]) -> None:
    assert re.fullmatch("[0-9a-f]{32}", idempotency_key(*fields))


@given(FIELDS, FIELDS)
def test_other_fields_make_another_key(left: tuple[str, str, bytes, str], right: tuple[str, str, bytes, str]) -> None:
    assert (idempotency_key(*left) == idempotency_key(*right)) == (left == right)


def test_text_moved_from_one_field_to_the_next_makes_another_key() -> None:
    keys = [
        idempotency_key("ab", "c", b"", ""),
        idempotency_key("a", "bc", b"", ""),
        idempotency_key("a", "b", b"c", ""),
        idempotency_key("a", "b", b"", "c"),
    ]
    assert all(left != right for left, right in pairwise(sorted(keys)))


def test_a_message_has_a_key_for_each_step() -> None:
    message = Message(ID.hex(), "payments", 0, 7, None, (), 0, None, app="billing", handler="settle")
    assert message.idempotency_key("charge") == idempotency_key("billing", "settle", ID, "charge")
    assert message.idempotency_key("charge") != message.idempotency_key("mail")


@pytest.mark.parametrize("step", ["", None, 1])
def test_a_request_without_a_name_is_refused(step: object) -> None:
    message = Message(ID.hex(), "payments", 0, 7, None, (), 0, None)
    with pytest.raises(TransactionMisuse, match="name the step"):
        message.idempotency_key(step)  # type: ignore[arg-type]
