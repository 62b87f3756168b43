from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from consumer.core.grouping import Group, Write, are_apart, group

UNITS = st.sampled_from(["ann", "bob", "cy", ("key", 0, b"k")])
SQLS = st.sampled_from(["insert a", "update b", "update c", "delete d"])


@st.composite
def numbered_writes(draw: st.DrawFn) -> list[Write]:
    """Writes whose arguments tell them apart: the unit, and the place in the order deferred."""
    pairs = draw(st.lists(st.tuples(UNITS, SQLS), max_size=40))
    return [(unit, sql, (unit, n)) for n, (unit, sql) in enumerate(pairs)]


def executed(groups: Sequence[Group]) -> list[Write]:
    """What the database sees, in order. The arguments carry the unit."""
    return [(args[0], sql, args) for sql, arguments in groups for args in arguments]


def logs(writes: Sequence[Write]) -> dict[object, list[tuple[str, object]]]:
    """The naive execution: every unit appends what it does to a log of its own."""
    found: dict[object, list[tuple[str, object]]] = {}
    for unit, sql, args in writes:
        found.setdefault(unit, []).append((sql, args[1]))
    return found


@given(numbered_writes())
def test_every_write_is_executed_exactly_once(writes: list[Write]) -> None:
    assert Counter(executed(group(writes))) == Counter(writes)


@given(numbered_writes())
def test_a_unit_sees_its_writes_in_the_order_deferred(writes: list[Write]) -> None:
    assert logs(executed(group(writes))) == logs(writes)


@given(numbered_writes())
def test_there_are_no_more_groups_than_writes_and_none_is_empty(writes: list[Write]) -> None:
    groups = group(writes)
    assert len(groups) <= len(writes)
    assert all(arguments for _, arguments in groups)


@given(st.lists(UNITS, min_size=1, max_size=30))
def test_one_sql_of_any_units_is_one_group_in_the_order_given(units: list[object]) -> None:
    writes: list[Write] = [(unit, "insert a", (unit, n)) for n, unit in enumerate(units)]
    assert group(writes) == [("insert a", [args for _, _, args in writes])]


@given(st.integers(1, 30), st.lists(SQLS, min_size=1, max_size=5, unique=True))
def test_units_that_write_the_same_statements_in_the_same_order_share_them_all(units: int, sqls: list[str]) -> None:
    writes: list[Write] = [(unit, sql, (unit, sql)) for unit in range(units) for sql in sqls]
    assert [sql for sql, _ in group(writes)] == sqls


@given(numbered_writes())
def test_neighbouring_groups_never_have_the_same_sql(writes: list[Write]) -> None:
    sqls = [sql for sql, _ in group(writes)]
    assert all(one != other for one, other in zip(sqls, sqls[1:], strict=False))


def test_a_statement_that_comes_back_after_another_of_its_unit_waits_for_it() -> None:
    writes: list[Write] = [("ann", "a", (1,)), ("ann", "b", (2,)), ("ann", "a", (3,)), ("bob", "a", (4,))]
    assert group(writes) == [("a", [(1,)]), ("b", [(2,)]), ("a", [(3,), (4,)])]


def test_no_writes_are_no_groups() -> None:
    assert group([]) == []


TOUCHES = {
    "insert a": frozenset({"a"}),
    "update b": frozenset({"b"}),
    "update c": frozenset({"c", "key of b"}),
    "delete d": frozenset({"d", "key of b"}),
}


@given(numbered_writes())
def test_what_may_meet_keeps_its_order_within_a_unit(writes: list[Write]) -> None:
    found = executed(group(writes, TOUCHES))
    assert Counter(found) == Counter(writes)
    for unit in {unit for unit, _, _ in writes}:
        for together in ({"insert a"}, {"update b"}, {"update c", "delete d"}):
            places = [args[1] for other, sql, args in found if other == unit and sql in together]
            assert places == sorted(places)


@given(numbered_writes())
def test_statements_that_meet_nothing_in_common_make_one_group_each(writes: list[Write]) -> None:
    apart = {sql: frozenset({sql}) for _, sql, _ in writes}
    assert len(group(writes, apart)) == len(apart) and are_apart(apart)


def test_statements_meet_through_a_third() -> None:
    touches = {"x": frozenset({1}), "y": frozenset({2}), "z": frozenset({1, 2})}
    writes: list[Write] = [("ann", "x", (0,)), ("ann", "y", (1,)), ("ann", "x", (2,)), ("ann", "z", (3,))]
    assert group(writes, touches) == [("x", [(0,)]), ("y", [(1,)]), ("x", [(2,)]), ("z", [(3,)])]
    assert not are_apart(touches)
    assert group(writes[:3], {"x": touches["x"], "y": touches["y"]}) == [("x", [(0,), (2,)]), ("y", [(1,)])]
