"""Count what transactions wrote that should have written nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from consumer.replay.wording import counted, problem, rows_were


@dataclass(slots=True)
class EffectCounts:
    """What transactions wrote that should have written nothing.

    rows: table -> rows inserted, updated, deleted. non_row_writes: transactions that PostgreSQL gave an id although no
    row was counted (TRUNCATE, a row lock). claims: ids that were claimed although the ledger held them. uncounted: why
    sequences were not read.
    """

    transactions: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)
    non_row_writes: int = 0
    claims: int = 0
    sequences: list[str] = field(default_factory=list)
    uncounted: str = ""

    @property
    def total(self) -> int:
        """Rows written."""
        return sum(map(sum, self.rows.values()))

    @property
    def any(self) -> bool:
        """Whether anything at all was written."""
        return bool(self.total or self.non_row_writes or self.claims or self.sequences)

    def add(self, table: str, inserted: int, updated: int, deleted: int) -> None:
        """Add rows of a table."""
        row = self.rows.setdefault(table, [0, 0, 0])
        for column, count in enumerate((inserted, updated, deleted)):
            row[column] += count

    def problems(self) -> Iterator[dict[str, Any]]:
        """Yield a problem for each kind of write; counts may be 0."""
        tables = ", ".join(f"{table} {sum(row)}" for table, row in sorted(self.rows.items()) if any(row))
        yield problem(
            "effects",
            self.total,
            f"{rows_were(self.total)} written for messages that were applied before ({tables}): a handler writes in spite of "
            "the claim",
        )
        yield problem(
            "effects_otherwise",
            self.non_row_writes,
            f"{counted(self.non_row_writes, 'transaction')} wrote something that is no row (TRUNCATE, a row lock) for messages "
            "that were applied before",
        )
        yield problem(
            "claims",
            self.claims,
            f"{counted(self.claims, 'id')} could be claimed although the ledger held them: the claim does not hold",
        )
        names = ", ".join(self.sequences[:10])
        yield problem(
            "sequences",
            len(self.sequences),
            f"{counted(len(self.sequences), 'sequence')} moved for messages that were applied before: {names}",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and how they were counted."""
        how = (
            f"every message was claimed as a worker does, in {counted(self.transactions, 'transaction')} rolled back afterwards; "
            "before each rollback PostgreSQL was asked how many rows of which tables this transaction had inserted, updated "
            "or deleted (pg_stat_xact_all_tables, every table outside the schema consumer), and whether it had given the "
            "transaction an id, without which nothing can be written; "
        )
        how += self.uncounted or "the sequences that these sessions advanced were asked for with currval"
        return {
            "transactions": self.transactions,
            "rows": self.total,
            "tables": {
                table: dict(zip(("inserted", "updated", "deleted"), row, strict=True))
                for table, row in sorted(self.rows.items())
            },
            "otherwise": self.non_row_writes,
            "claims": self.claims,
            "sequences": self.sequences,
            "how": how,
        }
