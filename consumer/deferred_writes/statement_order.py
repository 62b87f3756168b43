"""Which deferred writes may share one statement.

Grouped statements leave what running them one after the other would leave.

The writes of a flush are one sequence, in the order of their messages. A write joins the newest group of its statement
if it commutes with everything in the groups after that one. What a statement touches is proved by
deferred_writes/catalog.py; one without a plan is a barrier: it commutes with nothing, but consecutive executions of it
still are one group. Knows statements and arguments; knows no connection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from consumer.deferred_writes.catalog import Plan
from consumer.deferred_writes.rounds import key_of

Write: TypeAlias = tuple[str, Sequence[Any]]  # SQL, arguments
Group: TypeAlias = tuple[str, list[Sequence[Any]]]  # SQL, one list of arguments for each execution
Plans: TypeAlias = Mapping[str, Plan | None]  # None: a barrier

_Pin: TypeAlias = tuple[int, str]  # parameter, type of the column
# A relation's rows with one key, any of its rows with a key, or all of it; a foreign key or a sequence.
_Element: TypeAlias = tuple[Hashable, ...]


def commute(plans: Plans) -> bool:
    """Whether all these statements commute, whatever their arguments.

    Then one group of each is enough.
    """
    touched: set[Hashable] = set()
    count = 0
    for plan in plans.values():
        if plan is None:
            return False
        count += len(plan.touches)
        touched |= plan.touches
    return len(touched) == count


def group(writes: Iterable[Write], plans: Plans) -> list[Group]:
    """Return groups to run one after the other, in one pass.

    The arguments of each group keep their order. plans: of every statement.
    """
    groups: list[Group] = []
    newest: dict[str, int] = {}  # SQL -> index of its newest group
    reached: dict[
        _Element, list[tuple[int, str]]
    ] = {}  # element -> last groups that touch it, of two statements at most
    barrier = -1  # index of the newest group of a barrier
    pins = _pins(plans)
    fixed = {sql: _unpinned(plan) for sql, plan in plans.items() if plan is not None and sql not in pins}
    for sql, args in writes:
        plan = plans[sql]
        index = newest.get(sql, -1)
        if plan is None:
            if index < 0 or index < len(groups) - 1:
                index = _new(groups, newest, sql)
            barrier = max(barrier, index)
        else:
            meets, marks = fixed[sql] if sql in fixed else _pinned(plan, pins[sql], args)
            floor = barrier
            for element in meets:
                for at, other in reached.get(element, ()):
                    if other != sql:
                        floor = max(floor, at)
            if index < 0 or index < floor:
                index = _new(groups, newest, sql)
            for element in marks:
                _mark(reached.setdefault(element, []), index, sql)
        groups[index][1].append(args)
    return groups


def _new(groups: list[Group], newest: dict[str, int], sql: str) -> int:
    newest[sql] = len(groups)
    groups.append((sql, []))
    return newest[sql]


def _pins(plans: Plans) -> dict[str, _Pin]:
    """Return, for each table, one column that pins all its statements."""
    by_relation: dict[int, list[tuple[str, Plan]]] = {}
    for sql, plan in plans.items():
        if plan is not None:
            by_relation.setdefault(plan.relation, []).append((sql, plan))
    pins: dict[str, _Pin] = {}
    for those in by_relation.values():
        shared = set.intersection(*(set(plan.pins) for _, plan in those))
        if len(those) > 1 and shared:
            column = min(shared)
            pins |= {sql: plan.pins[column] for sql, plan in those}
    return pins


_Elements: TypeAlias = tuple[list[_Element], list[_Element]]  # to compare with what others have marked, and to mark


def _unpinned(plan: Plan) -> _Elements:
    """What every execution of a statement touches."""
    return [element for table in plan.touches for element in ((table,), (table, "any"))], [
        (table,) for table in plan.touches
    ]


def _pinned(plan: Plan, pin: _Pin, args: Sequence[Any]) -> _Elements:
    """Return what one execution touches: only rows with its key."""
    place, kind = pin
    table = plan.relation
    key = key_of(kind, args[place]) if place < len(args) else None
    if key is None:  # it may be any row
        return _unpinned(plan)
    rest = plan.touches - {table}
    meets = [element for touched in rest for element in ((touched,), (touched, "any"))]
    return (
        [*meets, (table,), (table, "key", key)],
        [*[(touched,) for touched in rest], (table, "key", key), (table, "any")],
    )


def _mark(furthest: list[tuple[int, str]], index: int, sql: str) -> None:
    """Keep the newest group of the two statements that reached furthest."""
    for place, (at, other) in enumerate(furthest):
        if other == sql:
            furthest[place] = (max(at, index), sql)
            return
    furthest.append((index, sql))
    if len(furthest) > 2:
        furthest.remove(min(furthest, key=lambda mark: mark[0]))
