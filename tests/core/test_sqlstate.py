from __future__ import annotations

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.evidence import FailureVerdict, Others, judge
from consumer.core.sqlstate import CLASSES, EXACT, Meaning, meaning, without_values

pytestmark = pytest.mark.unit

TABLE = {
    Meaning.CONFLICT: "40001 40P01 40002 40003 57014",
    Meaning.LOCKED: "55P03",
    Meaning.OUTAGE: "08000 08003 08006 08001 08P01 57P01 57P02 57P03 57P05 25006 25P03 25P04 53100 53300 HV00N F0000",
    Meaning.INTERNAL: "53000 53200 53400 58000 58030 58P01 XX000 XX001 XX002",
    Meaning.STATE: "2200H 55000 55006 0A000 26000 HV000",
    Meaning.MESSAGE: "22001 22003 22012 22P02 23502 23503 23505 23514 23P01 P0001 25P02 2D000 21000",
    Meaning.DEPLOYMENT: "42601 42501 42P01 42703 42883 28000 28P01 3D000 3F000",
}


@pytest.mark.parametrize(
    ("expected", "code"), [(meaning, code) for meaning, codes in TABLE.items() for code in codes.split()]
)
def test_a_code_means_what_the_design_says(expected: Meaning, code: str) -> None:
    assert meaning(code) is expected


@given(
    st.sampled_from(["08", "53", "57", "58", "XX"]),
    st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=3, max_size=3),
)
def test_a_code_of_an_outage_class_counts_without_evidence_never(group: str, rest: str) -> None:
    for others in (Others.UNKNOWN, Others.FAIL_ALIKE):
        verdict = judge(meaning(group + rest), answers=True, alone=True, others=others)
        assert verdict is FailureVerdict.WAIT


@given(st.text(max_size=8))
def test_any_text_has_a_meaning(code: str) -> None:
    assert isinstance(meaning(code), Meaning)


def test_unlisted_sqlstate_is_the_messages_own_fault() -> None:
    assert meaning("") is Meaning.MESSAGE
    assert meaning("99999") is Meaning.MESSAGE


@pytest.mark.parametrize(
    ("code", "message", "left"),
    [
        ("22P02", 'invalid input syntax for type integer: "se"cret"', "invalid input syntax for type integer"),
        ("22003", 'value "secret" is out of range for type integer', 'value "…" is out of range for type integer'),
        (
            "22000",
            "invalid input for query argument $1: 'secret' (not a number)",
            "invalid input for query argument $1",
        ),
        ("23505", 'duplicate key value violates unique constraint "people_pkey"', None),
        ("42P01", 'relation "people" does not exist', None),
    ],
)
def test_values_are_left_out_and_names_are_not(code: str, message: str, left: str | None) -> None:
    assert without_values(code, message) == (message if left is None else left)


def every_code() -> list[str]:
    """All SQLSTATEs of the driver, which come from PostgreSQL's errcodes.txt."""
    codes = {getattr(value, "sqlstate", None) for value in vars(asyncpg.exceptions).values() if isinstance(value, type)}
    return sorted(code for code in codes if isinstance(code, str))


def test_every_code_of_postgresql_is_in_a_class_that_was_judged() -> None:
    codes = every_code()
    assert len(codes) > 250
    assert [code for code in codes if code not in EXACT and code[:2] not in CLASSES] == []


def test_codes_that_are_not_about_the_message_count_no_attempt() -> None:
    """Codes are judged by their class; the exceptions are listed."""
    of_the_message = {code for code in every_code() if meaning(code) is Meaning.MESSAGE}
    assert {code[:2] for code in of_the_message}.isdisjoint(
        {"08", "0A", "28", "3D", "3F", "40", "42", "53", "55", "57", "58", "72", "F0", "HV", "XX"}
    )
    assert {code for code in every_code() if code[:2] in ("22", "23", "25", "P0")} - of_the_message == {
        "2200H", "25006", "25P03", "25P04",
    }  # fmt: skip
