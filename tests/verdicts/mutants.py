"""Broken verdicts: the judge must find each.

A mutant replaces one function; its docstring says what goes wrong then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from replacing import Replacement, replace, undone_at_the_end

MUTANTS: dict[str, Callable[[], None]] = {}


def _mutant(patch: Callable[[], None]) -> Callable[[], None]:
    MUTANTS[patch.__name__.strip("_").replace("_", "-")] = patch
    return patch


def install(name: str) -> None:
    """Break the verdicts of this process in this way.

    "" leaves them alone.
    """
    if name:
        MUTANTS[name]()


@contextmanager
def broken(name: str) -> Iterator[list[Replacement]]:
    """Break the verdicts inside the block; yield what was replaced."""
    with undone_at_the_end() as replacements:
        install(name)
        yield replacements


@_mutant
def _partition_order() -> None:
    """A rebuild takes one partition after the other.

    Whenever their messages were applied.
    """
    from consumer.rebuild.applied_order import AppliedOrder, OrderEntry

    def rank(self: AppliedOrder, entry: OrderEntry, at: int) -> tuple[int, int, int, int]:
        place = self._places.get(entry.delivery.partition, 0)
        return place, place, entry.delivery.record.offset, entry.turn

    replace(AppliedOrder, "_rank", rank)


@_mutant
def _dropped_columns() -> None:
    """Columns that depend on when things ran are not compared.

    Not even whether they are null.
    """
    import dataclasses

    from consumer.rebuild import compare
    from consumer.rebuild.compare_sql import TableComparison
    from consumer.rebuild.table_model import Table

    original = compare._comparison

    def comparison(table: Table, ignored: Any, key: tuple[str, ...]) -> TableComparison:
        comparison_of_all = original(table, ignored, key)
        columns = tuple(column for column in comparison_of_all.columns if column.name not in comparison_of_all.clocked)
        return dataclasses.replace(comparison_of_all, columns=columns, null_only=(), clocked=frozenset())

    replace(compare, "_comparison", comparison)


@_mutant
def _ledger_unread() -> None:
    """A check does not look for ledger rows without a message."""
    from consumer.replay import ledger_diff

    async def compare(*_: Any) -> None:
        return None

    replace(ledger_diff, "compare", compare)


@_mutant
def _missing_uncounted() -> None:
    """A check does not count messages whose ledger row is gone."""
    from consumer.replay.findings import Findings

    original = Findings.total

    def total(self: Findings, outcome: str) -> int:
        return 0 if outcome == "missing" else original(self, outcome)

    replace(Findings, "total", total)
