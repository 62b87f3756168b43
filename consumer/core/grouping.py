"""Which deferred writes may share one statement, without reordering anything within a key.

Knows statements and units of order; knows no connection. A *unit* is what keeps its order: a message key of one
handler, a whole partition, or one message. Kafka promises order within a key and none across keys, so writes of
different units may be merged into one `executemany` per SQL text, and writes of one unit run in the order deferred.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeAlias

Write: TypeAlias = tuple[Hashable, str, Sequence[Any]]  # unit, SQL, arguments
Group: TypeAlias = tuple[str, list[Sequence[Any]]]  # SQL, one list of arguments for each execution


def group(writes: Iterable[Write]) -> list[Group]:
    """Groups to run one after the other, the arguments of each in the order given.

    Greedy, in one pass: a write joins the newest group of its SQL unless its unit has already written in a later
    group. Two writes of one unit therefore never change places; anything else may.
    """
    groups: list[Group] = []
    newest: dict[str, int] = {}  # SQL -> index of its newest group
    reached: dict[Hashable, int] = {}  # unit -> index of the last group it wrote in
    for unit, sql, args in writes:
        index = newest.get(sql, -1)
        if index < 0 or index < reached.get(unit, -1):
            index = len(groups)
            groups.append((sql, []))
            newest[sql] = index
        groups[index][1].append(args)
        reached[unit] = index
    return groups
