"""Fingerprints of code: what leaves them alike and what changes them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from consumer import App, Tx
from consumer.handler_records.handler_code import codes_of
from consumer.handler_records.source_text import CodePeriod, Versions, bytecode_text, constant_text, function_text

pytestmark = pytest.mark.unit

FEE = 3
RATES = {"eur": 1}


class Item(msgspec.Struct):
    name: str


class Order(msgspec.Struct):
    items: list[Item]


def fee(amount: int) -> int:
    return amount + FEE


def traced(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(function)
    async def inner(*args: Any) -> None:
        await function(*args)

    return inner


async def settle(order: Order, tx: Tx) -> None:
    tx.defer("insert into fees values ($1)", fee(len(order.items)))


def id_of(value: Any) -> str:
    return str(value["id"])


def code(function: Callable[..., Any] = settle, **options: Any) -> str:
    app = App("shop")
    app.handler("orders", name="settle", **options)(function)
    return codes_of(app.handlers["settle"]).code


PLAIN = "async def settle(a):\n    return f'{a}' + 'b'\n"


@pytest.mark.parametrize(
    "other",
    [
        "@app.handler('t')\nasync def settle(a):\n    return f'{a}' + 'b'\n",
        "async def other(a):  # why\n\n    # a comment\n    return f'{a}'  +  'b'\n",
        "    async def settle(a):\n      return (\n  f'{a}' + 'b')\n".replace("(\n", "").replace("b')", "b'"),
    ],
    ids=["decorator", "comments", "indented"],
)
def test_layout_does_not_change_a_text(other: str) -> None:
    assert function_text(other) == function_text(PLAIN)


@pytest.mark.parametrize("change", [("+", "-"), ("'b'", "'c'"), ("{a}", "{a!r}"), ("(a)", "(a, b)"), ("async ", "")])
def test_code_changes_a_text(change: tuple[str, str]) -> None:
    assert function_text(PLAIN.replace(*change)) != function_text(PLAIN)


def test_code_behind_an_empty_line_counts() -> None:
    text = "    def f(a):\n        b = 1\n\n        return {}\n"
    assert function_text(text.format("b")) != function_text(text.format("a"))
    text = '    def f(a):\n        """First.\n\n        {}\n        """\n'
    assert function_text(text.format("b")) != function_text(text.format("a"))


def test_text_of_f_strings_is_as_written() -> None:
    text = "def f(a):\n    return f'{{x}} {a:>{3}} {f\"{a}\"}'\n"
    assert "f'{{x}} {a:>{3}} {f\"{a}\"}'" in function_text(text)


def test_a_handler_has_the_same_code_twice() -> None:
    assert code() == code() and len(code()) == 32


def test_changed_helper_of_a_handler_changes_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code()
    monkeypatch.setitem(globals(), "FEE", 4)
    assert code() != before
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "fee", lambda amount: amount)
    assert code() != before
    monkeypatch.undo()
    monkeypatch.setitem(RATES, "eur", 2)  # nothing of it is reached
    assert code() == before


@pytest.mark.parametrize("options", [{"order": "none"}, {"concurrency": 3}, {"message_id": id_of}, {"allow_nan": True}])
def test_options_that_matter_change_the_code(options: dict[str, Any]) -> None:
    assert code(**options) != code()


def test_retries_and_timeouts_leave_the_code_alike() -> None:
    assert code(timeout=3) == code()


def test_a_wrapper_and_what_it_wraps_both_count() -> None:
    async def other(order: Order, tx: Tx) -> None: ...

    assert len({code(settle), code(traced(settle)), code(other), code(traced(other))}) == 4


def test_a_changed_payload_type_changes_the_code() -> None:
    def of(item: type) -> str:
        async def handle(item: item, tx: Tx) -> None: ...  # type: ignore[valid-type]

        handle.__annotations__["item"] = item
        return code(handle)

    class Renamed(msgspec.Struct):
        title: str

    assert of(Item) != of(Renamed)
    assert of(list[Item]) != of(list[Renamed])
    types = [msgspec.defstruct("Made", [(name, str)]) for name in ("a", "a", "b")]
    for item in types:
        item.__module__ = __name__
    first, same, third = map(of, types)
    assert first == same != third


def test_a_version_stands_for_the_code() -> None:
    async def other(order: Order, tx: Tx) -> None: ...

    assert code(version="2") == code(other, version="2", concurrency=3) == "version:2"
    assert code(version="2") != code(version="3")


def test_code_without_source_is_compared_by_its_bytecode() -> None:
    def compiled(text: str) -> Callable[..., Any]:
        names: dict[str, Any] = {"Order": Order, "Tx": Tx, "__name__": __name__}
        exec(text, names)
        settle: Callable[..., Any] = names["settle"]
        return settle

    text = "async def settle(order: Order, tx: Tx) -> None:\n    tx.defer('insert into a values (1)')\n"
    first, same = compiled(text), compiled(text)
    assert code(first) == code(same) != code(compiled(text.replace("(1)", "(2)")))
    assert bytecode_text(first.__code__, "a") != bytecode_text(first.__code__, "b")


def test_id_functions_have_a_code_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def codes() -> tuple[str, str]:
        app = App("shop")
        app.handler("orders", name="settle", message_id=id_of)(settle)
        return codes_of(app.handlers["settle"])

    before = codes()
    monkeypatch.setitem(globals(), "FEE", 4)
    after = codes()
    assert before[0] != after[0] and before[1] == after[1] != ""


def test_constants_are_plain_and_cannot_change() -> None:
    assert constant_text((1, "a", frozenset({b"b", b"a"}))) == "tuple(1, 'a', frozenset(b'a', b'b'))"
    assert constant_text([1]) is None and constant_text((1, [2])) is None and constant_text({}) is None


def test_message_counts_as_applied_by_other_code_in_these_cases() -> None:
    hour = 3_600_000_000
    now = Versions((), 5 * hour, 5 * hour)
    assert not now.may_be_other(6 * hour) and not now.may_be_other(None)
    assert now.may_be_other(4 * hour)  # before anything was recorded
    both = Versions((CodePeriod(5 * hour, 7 * hour),), 5 * hour, 8 * hour)
    assert both.may_be_other(6 * hour) and both.may_be_other(7 * hour + 1) and both.may_be_other(None)
    assert not both.may_be_other(8 * hour)
    assert Versions().may_be_other(hour) and not Versions().may_be_other(None)
    assert both._replace(since=None).may_be_other(8 * hour)  # today's code has never run
