"""What the demo has counted, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.table import Table


@dataclass(slots=True)
class DemoResult:
    """What was counted. Sums are in cents."""

    produced: int = 0
    distinct: int = 0
    applied: int = 0
    payments_stored: int = 0
    duplicates_by_batch: int = 0  # twice in one batch
    duplicates_by_precheck: int = 0
    duplicates_by_ledger: int = 0
    dead_lettered: int = 0
    redelivered_after_kill: int = 0
    receipts: int = 0  # by message id, as read from Kafka
    receipts_repeated: int = 0  # read again under the same message id
    balance_sum: int = 0
    balance_sum_expected: int = 0
    accounts_wrong: int = 0
    replayed: int = 0
    missing_in_replay: int = 0
    rows_written_by_replay: int = 0
    applied_by_replay: int = 0
    differences_in_rebuild: int = 0
    replays_agree: bool = False
    seconds: float = 0.0

    @property
    def agree(self) -> bool:
        """Whether every effect is there once, and no message is missing."""
        duplicates = self.duplicates_by_batch + self.duplicates_by_precheck + self.duplicates_by_ledger
        return (
            self.applied == self.payments_stored == self.distinct
            and self.applied + duplicates == self.produced
            and self.dead_lettered == 0
            and self.receipts == self.distinct
            and self.balance_sum == self.balance_sum_expected
            and self.accounts_wrong == 0
            and self.replays_agree
        )

    def as_json(self) -> str:
        """Return what `consumer demo --json` prints."""
        return json.dumps({**asdict(self), "agree": self.agree}, indent=2)

    def as_table(self) -> Table:
        """Return what `consumer demo` prints."""
        table = Table(show_header=False, title=f"{self.produced:,} payments", title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for label, value in (
            ("produced", f"{self.produced:,}"),
            ("distinct", f"{self.distinct:,}"),
            ("applied", f"{self.applied:,}"),
            ("duplicates stopped within a batch", f"{self.duplicates_by_batch:,}"),
            ("duplicates stopped by the pre-check (Redis)", f"{self.duplicates_by_precheck:,}"),
            ("duplicates stopped by the ledger (PostgreSQL)", f"{self.duplicates_by_ledger:,}"),
            ("redelivered after the kill", f"{self.redelivered_after_kill:,}"),
            ("receipts in Kafka, by message id", f"{self.receipts:,}"),
            ("receipts that are there twice, under one id", f"{self.receipts_repeated:,}"),
            ("sum of balances", _money(self.balance_sum)),
            ("expected sum", _money(self.balance_sum_expected)),
            ("accounts with a wrong balance", f"{self.accounts_wrong:,}"),
            ("replayed", f"{self.replayed:,}"),
            ("missing in the replay", f"{self.missing_in_replay:,}"),
            ("rows that the replay would have written", f"{self.rows_written_by_replay:,}"),
            ("applied by `replay --apply`", f"{self.applied_by_replay:,}"),
            ("differences found by `consumer rebuild`", f"{self.differences_in_rebuild:,}"),
        ):
            table.add_row(label, value)
        return table


def _money(cents: int) -> str:
    return f"{cents // 100:,}.{cents % 100:02}"
