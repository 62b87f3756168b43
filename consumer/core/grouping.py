"""Which deferred writes may share one statement, without reordering anything within a key.

Knows statements, units of order and what each statement touches; knows no connection. A *unit* is what keeps its order: a
message key of one handler, a whole partition, or one message. Kafka promises order within a key and none across keys, so
writes of different units may be merged into one group per SQL text. Writes of one unit run in the order deferred, but for
those of which it is known that they touch nothing in common: nobody can tell in which order these ran.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Write: TypeAlias = tuple[Hashable, str, Sequence[Any]]  # unit, SQL, arguments
Group: TypeAlias = tuple[str, list[Sequence[Any]]]  # SQL, one list of arguments for each execution
Touches: TypeAlias = Mapping[str, frozenset[Hashable]]  # SQL -> the tables and constraints that it may meet


def group(writes: Iterable[Write], touches: Touches | None = None) -> list[Group]:
    """Groups to run one after the other, the arguments of each in the order given.

    touches: of every statement among the writes; None when of any it is not known: then all may meet. Greedy, in one pass: a write joins the newest group of its SQL
    unless its unit has already written in a later group something that this write may meet. Two writes of one unit that
    may meet therefore never change places; anything else may.
    """
    groups: list[Group] = []
    newest: dict[str, int] = {}  # SQL -> index of its newest group
    reached: dict[tuple[Hashable, Hashable], int] = {}  # unit and field -> index of the last group it wrote in
    fields = None if touches is None else _fields(touches)
    for unit, sql, args in writes:
        field = None if fields is None else fields[sql]
        index = newest.get(sql, -1)
        if index < 0 or index < reached.get((unit, field), -1):
            index = len(groups)
            groups.append((sql, []))
            newest[sql] = index
        groups[index][1].append(args)
        reached[unit, field] = index
    return groups


def are_apart(touches: Touches) -> bool:
    """Whether no two of the statements may meet: then `group` makes one group of each, whatever the units."""
    return len(set(_fields(touches).values())) == len(touches)


def _fields(touches: Touches) -> dict[str, Hashable]:
    """Statements that may meet, directly or through others, share a field."""
    fields: list[tuple[set[str], set[Hashable]]] = []
    for sql, touched in touches.items():
        apart = [each for each in fields if not each[1] & touched]
        together = [each for each in fields if each[1] & touched]
        fields = [
            *apart,
            ({sql}.union(*(each[0] for each in together)), set(touched).union(*(each[1] for each in together))),
        ]
    return {sql: number for number, (texts, _) in enumerate(fields) for sql in texts}
