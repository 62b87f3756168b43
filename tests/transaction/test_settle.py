"""Which parts of a batch run, in which order, until when.

Transactions are replaced by a recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from consumer import App
from consumer.core.delivery import Batch, Delivery
from consumer.core.errors import ConsumerError
from consumer.core.message import LogRecord
from consumer.core.outcome import Outcome
from consumer.postgres.errors import Conflict, Outage
from consumer.transaction.isolate import Part, TransactionPoisoned
from consumer.transaction.result import NEXT_BATCH, BatchResult
from consumer.transaction.settle import next_parts, pause_seconds, settle

pytestmark = pytest.mark.unit

app = App("settling")


@app.handler("orders")
async def handle(payload: bytes) -> None: ...


def batch_of(*offsets: int) -> Batch:
    handler = app.handlers["handle"]
    records = [LogRecord("orders", 0, offset, 0, None, b"", (), "") for offset in offsets]
    return Batch([Delivery(handler, record) for record in records], {}, {})


def offsets_of(part: Part) -> list[int]:
    return [delivery.record.offset for delivery in part.batch.deliveries]


class Settled:
    """Runs the loop over recorded transactions.

    It keeps which parts ran and which were committed.
    """

    def __init__(self, run: Callable[[Part], BatchResult], *, prepares: int = 1000, rerun_late: bool = False) -> None:
        self.run = run
        self.prepares = prepares
        self.rerun_late = rerun_late
        self.ran: list[tuple[list[int], bool, int]] = []
        self.committed: list[list[int]] = []
        self.errors: list[Exception] = []

    async def prepare(self, part: Part) -> bool:
        self.prepares -= 1
        return self.prepares >= 0

    async def attempt(self, part: Part) -> BatchResult:
        self.ran.append((offsets_of(part), part.use_savepoints, part.failures))
        return self.run(part)

    async def after_failure(self, part: Part, error: Exception) -> Sequence[Part] | None:
        self.errors.append(error)
        return next_parts(part, error, lambda: 0.5)

    async def of(self, *batches: Batch) -> Settled:
        async for part, _ in settle(
            batches, self.prepare, self.attempt, self.after_failure, rerun_late=self.rerun_late
        ):
            self.committed.append(offsets_of(part))
        return self


def fails(when: Callable[[Part], bool], error: Exception) -> Callable[[Part], BatchResult]:
    def run(part: Part) -> BatchResult:
        if when(part):
            raise error
        return BatchResult()

    return run


async def test_batches_settle_in_their_order() -> None:
    settled = await Settled(lambda part: BatchResult()).of(batch_of(1, 2), batch_of(3))
    assert settled.committed == [[1, 2], [3]]


async def test_a_poisoned_transaction_runs_again_with_savepoints() -> None:
    settled = await Settled(fails(lambda part: not part.use_savepoints, TransactionPoisoned())).of(batch_of(1, 2))
    assert settled.ran == [([1, 2], False, 0), ([1, 2], True, 0)]
    assert settled.committed == [[1, 2]]


async def test_parts_of_a_poisoned_batch_keep_the_order_of_its_messages() -> None:
    settled = await Settled(fails(lambda part: len(part.batch.deliveries) > 1, TransactionPoisoned())).of(
        batch_of(1, 2, 3, 4)
    )
    assert settled.committed == [[1], [2], [3], [4]]


async def test_a_conflict_runs_the_same_part_again_and_then_cuts_it() -> None:
    settled = await Settled(fails(lambda part: len(part.batch.deliveries) > 1, Conflict("deadlock"))).of(batch_of(1, 2))
    assert settled.ran == [([1, 2], False, n) for n in range(4)] + [([1], False, 0), ([2], False, 0)]


async def test_an_outage_without_messages_is_tried_again_for_ever() -> None:
    settled = await Settled(fails(lambda part: part.failures < 20, Outage("away"))).of(Batch([], {}, {}))
    assert settled.committed == [[]] and len(settled.ran) == 21


async def test_an_error_that_nothing_heals_is_raised() -> None:
    with pytest.raises(ConsumerError, match="the schema"):
        await Settled(fails(lambda part: True, ConsumerError("the schema does not fit"))).of(batch_of(1))


async def test_loop_stops_when_a_part_cannot_be_prepared() -> None:
    settled = await Settled(lambda part: BatchResult(), prepares=1).of(batch_of(1), batch_of(2))
    assert settled.committed == [[1]]


async def test_loop_stops_when_a_failure_says_so() -> None:
    class Stopping(Settled):
        async def after_failure(self, part: Part, error: Exception) -> None:
            return None

    settled = await Stopping(fails(lambda part: True, Outage("away"))).of(batch_of(1), batch_of(2))
    assert settled.ran == [([1], False, 0)] and settled.committed == []


@pytest.mark.parametrize("rerun_late", [False, True])
async def test_messages_without_time_run_in_another_transaction_if_asked(rerun_late: bool) -> None:
    def run(part: Part) -> BatchResult:
        late: dict[Delivery, Outcome] = dict.fromkeys(part.batch.deliveries[2:], NEXT_BATCH)
        return BatchResult(outcomes=late)

    settled = await Settled(run, rerun_late=rerun_late).of(batch_of(1, 2, 3, 4, 5))
    assert settled.committed == ([[1, 2], [3, 4], [5]] if rerun_late else [[1, 2, 3, 4, 5]])


def test_the_pause_grows_and_is_bounded_after_hours_of_failures() -> None:
    pauses = [pause_seconds(failures) for failures in (0, 1, 2, 7, 100, 100_000)]
    assert pauses == sorted(pauses) and pauses[0] < 0.01
    assert pauses[-1] == 5.0
