"""The shape of a deferred write, and its text for many rows.

`insert into t values ($1, $2)` a thousand times is `insert into t select c1, c2 from unnest($1, $2)` once; an UPDATE or
an upsert likewise, in rounds that meet no row twice (deferred_writes/rounds.py), and a DELETE by key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consumer.deferred_writes.statement_reader import TYPES


@dataclass(frozen=True, slots=True)
class Shape:
    """A statement that is understood.

    kind: "insert", "upsert", "update" or "delete". table: its name as written, to be resolved by PostgreSQL. keys: the
    columns by which rows are found, with the parameter (from 0) that each is compared with: of an UPDATE or a DELETE
    those of its WHERE, of an upsert the one that conflicts; empty for an INSERT. assigned: the columns that an UPDATE
    or an upsert changes. added: the columns that a parameter is added to or subtracted from, with that parameter, of an
    UPDATE that does no more with its parameters and rows than that and the keys; else empty. inserted: of an INSERT,
    each value's parameter, None for another expression. columns: those that an INSERT lists. names: the columns that
    expressions mention. functions: those of FUNCTIONS that they call. borrowed: columns of an upsert whose new value
    stands for its parameter in the form for many rows. has_rows: whether there is a form for many rows at all.
    """

    kind: str
    table: str
    parameters: int
    keys: tuple[tuple[str, int], ...] = ()
    assigned: tuple[str, ...] = ()
    added: tuple[tuple[str, int], ...] = ()
    inserted: tuple[int | None, ...] = ()
    columns: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    borrowed: tuple[tuple[str, int], ...] = ()
    has_rows: bool = True
    _before: str = ""
    _expressions: str = ""
    _after: str = ""

    def text(self, types: Sequence[str]) -> str:
        """Return the statement for arrays, one for each parameter.

        types: names of `TYPES` only.
        """
        if len(types) != self.parameters or not TYPES.issuperset(types):
            raise ValueError(f"types {types} for {self.parameters} parameters")
        arrays = ", ".join(f"${n}::pg_catalog.{name}[]" for n, name in enumerate(types, 1))
        names = ", ".join(f"consumer_c{n}" for n in range(1, self.parameters + 1))
        joined = "using" if self.kind == "delete" else "from"
        rows = f"{joined} unnest({arrays}) as consumer_r({names})"
        return f"{self._before} {self._expressions} {rows} {self._after}"
