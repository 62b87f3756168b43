from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.deferred_writes.catalog import Plan
from consumer.deferred_writes.statement_order import Group, Plans, Write, commute, group
from consumer.deferred_writes.statement_shape import Shape

pytestmark = pytest.mark.unit

SQLS = ["insert a", "update b", "delete b", "upsert c", "insert d", "call e"]
_SHAPE = Shape("insert", "t", 1)


def plan(relation: int, *touches: int, pin: bool = False) -> Plan:
    pins = {"id": (0, "int4")} if pin else {}
    return Plan(_SHAPE, relation, frozenset([relation, *touches]), pins, ["int4"])


# d references c: they share the foreign key 90. b's statements find rows by the same key. Nothing is known of e.
PLANS: Plans = {
    "insert a": plan(1),
    "update b": plan(2, pin=True),
    "delete b": plan(2, pin=True),
    "upsert c": plan(3, 90),
    "insert d": plan(4, 90),
    "call e": None,
}


@st.composite
def numbered_writes(draw: st.DrawFn) -> list[Write]:
    """Writes whose second argument is their place.

    The first is a key, or a value that is not known to be one.
    """
    pairs = draw(st.lists(st.tuples(st.sampled_from(SQLS), st.sampled_from([1, 2, 3, None])), max_size=40))
    return [(sql, (key, place)) for place, (sql, key) in enumerate(pairs)]


def executed(groups: Sequence[Group]) -> list[Write]:
    """What the database sees, in order."""
    return [(sql, args) for sql, arguments in groups for args in arguments]


def may_swap(one: Write, other: Write) -> bool:
    """The rule, written out: whether these two may run in either order."""
    (sql, (key, _)), (sql_2, (key_2, _)) = one, other
    if "call e" in (sql, sql_2) or sql == sql_2:
        return False
    if {sql, sql_2} == {"update b", "delete b"}:
        return key is not None and key_2 is not None and key != key_2
    return {sql, sql_2} != {"upsert c", "insert d"}


@given(numbered_writes())
def test_group_writes_run_once_each(writes: list[Write]) -> None:
    assert Counter(executed(group(writes, PLANS))) == Counter(writes)


@given(numbered_writes())
def test_group_writes_that_do_not_commute_keep_their_order(writes: list[Write]) -> None:
    order = executed(group(writes, PLANS))
    for at, one in enumerate(order):
        for other in order[at + 1 :]:
            assert one[1][1] < other[1][1] or may_swap(one, other), (one, other)


@given(numbered_writes())
def test_group_barriers_only_keep_the_order_of_all(writes: list[Write]) -> None:
    groups = group(writes, dict.fromkeys(SQLS))
    assert executed(groups) == writes
    assert all(one[0] != other[0] for one, other in zip(groups, groups[1:], strict=False))


@given(numbered_writes())
def test_group_commuting_statements_make_one_group_each(writes: list[Write]) -> None:
    plans: dict[str, Any] = {sql: plan(place) for place, sql in enumerate(SQLS)}
    assert commute(plans)
    assert len(group(writes, plans)) == len({sql for sql, _ in writes})


def test_group_two_statements_on_two_tables_are_two_groups() -> None:
    writes: list[Write] = [(sql, (key, 0)) for key in range(9) for sql in ("insert a", "update b")]
    assert [sql for sql, _ in group(writes, PLANS)] == ["insert a", "update b"]


def test_group_two_statements_on_one_table_split_at_a_key_they_share() -> None:
    writes: list[Write] = [("update b", (1,)), ("delete b", (2,)), ("update b", (3,)), ("update b", (2,))]
    assert group(writes, PLANS) == [("update b", [(1,), (3,)]), ("delete b", [(2,)]), ("update b", [(2,)])]


def test_group_a_whole_table_meets_rows_with_keys_of_a_part() -> None:
    plans: Plans = {"root": plan(9, 2), "update b": plan(2, pin=True), "delete b": plan(2, pin=True)}
    writes: list[Write] = [("root", (1,)), ("update b", (1,)), ("root", (2,)), ("delete b", (5,)), ("update b", (6,))]
    assert [sql for sql, _ in group(writes, plans)] == ["root", "update b", "root", "delete b", "update b"]


def test_commute_statements_that_share_anything_do_not() -> None:
    assert not commute({"x": plan(1, 5), "y": plan(2, 5)})
    assert not commute({"x": plan(1), "y": None})
    assert commute({"x": plan(1), "y": plan(2)})


def test_group_no_writes_are_no_groups() -> None:
    assert group([], {}) == []
