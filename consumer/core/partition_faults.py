"""Why one partition cannot be read, and how it continues.

Pure: turns what fetching reported into a PartitionHalt. Limitations: whether the cause ends by itself is unknown. So a
worker tries again from time to time, and an operator may skip the records.
"""

from __future__ import annotations

from typing import NamedTuple

from consumer.core.log_identity import HaltReason, PartitionHalt
from consumer.core.message import Partition

RETRY_SECONDS = (2.0, 4.0, 8.0, 15.0)  # the last one repeats
_LOG_AGAIN_SECONDS = 600.0


class ReadFailure(NamedTuple):
    """The failure of a fetch of a partition from offset `first`.

    last: the last offset of the batch, None where it is unknown. is_brokers: the broker itself cannot read it.
    """

    reason: HaltReason
    text: str
    first: int
    last: int | None = None
    is_brokers: bool = False


def halt_of(partition: Partition, failure: ReadFailure) -> PartitionHalt:
    """Return the halt for a failure."""
    first, last = failure.first, failure.last if failure.last is not None else failure.first
    place = f"--topic {partition.topic} --partition {partition.partition}"
    match failure.reason:
        case HaltReason.NOT_ALLOWED:
            return PartitionHalt(
                HaltReason.NOT_ALLOWED,
                f"Kafka refuses to read topic {partition.topic}: {failure.text}",
                f"allow the worker's Kafka user READ and DESCRIBE on {partition.topic} (kafka-acls.sh); it goes on by itself",
            )
        case HaltReason.BROKER_ERROR:
            return PartitionHalt(
                HaltReason.BROKER_ERROR,
                f"the brokers give nothing from offset {first}: {failure.text}",
                "repair the partition in Kafka; it goes on by itself",
            )
        case _:
            pass  # the records themselves: an operator moves past them
    records = f"record {first}" if last == first else f"records {first} to {last}"
    return PartitionHalt(
        failure.reason,
        f"{records} cannot be read: {failure.text}",
        f"{place} --move-to {last + 1}",
        (first, last),
    )


class UnreadablePartition:
    """One unreadable partition: its retries, and when it was logged."""

    def __init__(self, stop: PartitionHalt, first: int, now: float) -> None:
        self.stop = stop
        self.first = first
        self.attempts = 0
        self.retry_at = now + RETRY_SECONDS[0]
        self._logged_at: float | None = None

    def record_failure(self, stop: PartitionHalt, first: int, now: float) -> bool:
        """Record a failure, and return whether to log it.

        A new one is logged at once, a repeated one rarely.
        """
        is_new = (stop.reason, stop.text) != (self.stop.reason, self.stop.text) or self._logged_at is None
        if is_new:
            self.attempts = 0
        self.stop, self.first = stop, first
        self.retry_at = now + RETRY_SECONDS[min(self.attempts, len(RETRY_SECONDS) - 1)]
        self.attempts += 1
        if is_new or (self._logged_at is not None and now - self._logged_at > _LOG_AGAIN_SECONDS):
            self._logged_at = now
            return True
        return False
