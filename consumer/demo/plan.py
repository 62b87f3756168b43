"""Which payments the demo produces, which of them twice, and its tables."""

from __future__ import annotations

import random
from dataclasses import dataclass
from uuid import UUID, uuid4

ACCOUNTS = 1000
DUPLICATES_PERCENT = 10
TABLES = f"""
create table payments (payment_id uuid not null, account int not null, amount bigint not null);
create table accounts (account int primary key, balance bigint not null default 0);
insert into accounts (account) select generate_series(0, {ACCOUNTS - 1});
"""


@dataclass(frozen=True, slots=True)
class PlannedPayment:
    """A message to produce. amount: in cents.

    elsewhere: a repetition that goes to another partition than the first.
    """

    payment_id: UUID
    account: int
    amount: int
    elsewhere: bool = False


def plan(count: int, chance: random.Random) -> list[PlannedPayment]:
    """Plan payments in the order of their production.

    DUPLICATES_PERCENT of `count` repeat an earlier one.

    Half of the repetitions follow at once, as a producer's own retry would, and half come much later; every other one
    goes to another partition, where another worker may have it in hand at the same time.
    """
    repeats = count * DUPLICATES_PERCENT // 100
    firsts = [
        PlannedPayment(uuid4(), chance.randrange(ACCOUNTS), chance.randrange(1, 100_000))
        for _ in range(count - repeats)
    ]
    placed: list[tuple[float, PlannedPayment]] = [(float(n), payment) for n, payment in enumerate(firsts)]
    for n, at in enumerate(chance.sample(range(len(firsts)), repeats)):
        first = firsts[at]
        later = chance.uniform(0, 50) if n % 2 else chance.uniform(0, len(firsts) - at)
        placed.append((at + later, PlannedPayment(first.payment_id, first.account, first.amount, elsewhere=n % 4 < 2)))
    placed.sort(key=lambda entry: entry[0])
    return [payment for _, payment in placed]
