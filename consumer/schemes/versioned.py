"""Updates a row only if its version is unchanged: optimistic locking.

Optimistic concurrency control (Kung and Robinson, 1981). Knows one conditional UPDATE of one row with a version column.
Limitations: does not know what the caller read, nor whether its new values still follow from that; hence `Stale`, and a
fresh read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consumer.core.errors import RunAgain
from consumer.core.identifiers import columns_of, ident, table_ident
from consumer.schemes.database import SUPPRESSED, Database, Misfit, NotFound, checked

_VERSION_MAX = 2**63 - 1


class Stale(RunAgain):
    """Another writer was first: read the row again, and decide again.

    In a handler, do not catch it: the message runs again by the handler's retry policy, uncounted. `expected` and
    `found` are versions.
    """

    def __init__(self, text: str, expected: int, actual: int) -> None:
        super().__init__(text)
        self.expected = expected
        self.found = actual


async def update_versioned(
    tx: Database,
    table: str,
    key: Mapping[str, Any],
    *,
    expected: int,
    set: Mapping[str, Any],
    version: str = "version",
) -> int:
    """Update one row if its version is still the expected one.

    Returns the new version, which is one higher.

    tx: a `Tx` or an asyncpg connection. key: column -> value, and must name one row. expected: the version that was
    read with the values which the new ones follow from. set: column -> new value. version: the column of whole numbers.

    Raises Stale if another was first, NotFound if there is no such row (one more statement distinguishes them, only
    then), TypeError for an expected version that is not a whole number and ValueError for an impossible one, ValueError
    if `set` is empty or names the key or the version, Misfit for a missing table or column, a version that is NULL, an
    update that a trigger, a rule or row-level security suppresses, or a key that named several rows (roll back then:
    they were changed).

    Limitations:

    - It may not succeed: on a hot row each round lets one writer through and sends all others back. One always wins, so
      together they make progress, but one may lose as often as all others succeed. If many write one row, a row lock
      (``select … for update``) is the better way: docs/how-to/schemes.md has the measured ratio.
    - A repetition is not silent: the same update sent twice is Stale the second time. Recognizing it is the ledger's task.
    - Other writers are not kept out: each of them must increment the version too. A trigger can enforce that.
    """
    where = columns_of("key", key)
    changed = columns_of("set", set)
    if isinstance(expected, bool) or not isinstance(expected, int):
        raise TypeError(f"update_versioned: expected= is a whole number, not {type(expected).__name__}")
    if not 0 <= expected < _VERSION_MAX:
        raise ValueError("update_versioned: expected= is a version, so at least 0, and a bigint")
    if taken := {version, *where} & {*changed}:
        raise ValueError(f"update_versioned: set= names {sorted(taken)[0]!r}, which is the key's or the version's")
    values = [*set.values(), *key.values()]
    sql, look = _statements(table, where, changed, version)
    call = f"update_versioned of {table}"
    for _ in range(2):
        rows = await checked(tx.fetch(sql, *values, expected), call)
        if len(rows) > 1:
            raise Misfit(f"{call}: the key names {len(rows)} rows, which are all changed now: roll back")
        if rows:
            return _grown(rows[0][0], expected, call)
        current = await checked(tx.fetch(look, *key.values()), call)
        if not current:
            raise NotFound(f"{call}: there is no such row")
        if current[0][0] is None:
            raise Misfit(f"{call}: the version is NULL")
        if current[0][0] != expected:
            raise Stale(f"{call}: version {current[0][0]} instead of {expected}", expected, int(current[0][0]))
        # race: another writer has just moved it to the expected version. Versions only rise, so this happens once.
    raise Misfit(f"{call}: the row has the expected version, and the update changes nothing: {SUPPRESSED}")


def _statements(table: str, where: Sequence[str], changed: Sequence[str], version: str) -> tuple[str, str]:
    """Return the UPDATE, and the SELECT that explains a missing change."""
    target, counter = table_ident(table), ident(version)
    sets = ", ".join(f"{ident(column)} = ${n}" for n, column in enumerate(changed, 1))
    names_it = [f"{ident(column)} = ${n}" for n, column in enumerate(where, len(changed) + 1)]
    sql = (
        f"update {target} set {sets}, {counter} = {counter} + 1 "  # noqa: S608 - by ident
        f"where {' and '.join(names_it)} and {counter} = ${len(changed) + len(where) + 1} returning {counter}"
    )
    look = (
        f"select {counter} from {target} "  # noqa: S608 - by ident
        f"where {' and '.join(f'{ident(column)} = ${n}' for n, column in enumerate(where, 1))} limit 1"
    )
    return sql, look


def _grown(version: int | None, expected: int, call: str) -> int:
    if version is None or version <= expected:
        raise Misfit(f"{call}: the version does not grow by the update, so a trigger undoes it: roll back")
    return int(version)
