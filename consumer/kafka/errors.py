"""Errors of Kafka that other packages handle.

The client's own are re-exported here, so that no other package imports it.
"""

from __future__ import annotations

from aiokafka.errors import CorruptRecordException as CorruptRecordException
from aiokafka.errors import KafkaError as KafkaError

from consumer.core.errors import CannotTell
from consumer.core.message import Partition
from consumer.core.partition_faults import ReadFailure, halt_of


class LogTruncated(Exception):
    """The broker refused a fetch position.

    Records were removed, or the log is another one.
    """

    def __init__(self, partition: Partition, position: int) -> None:
        super().__init__(f"{partition.topic}:{partition.partition} does not hold offset {position}")
        self.partition = partition
        self.position = position


class PartitionUnreadable(CannotTell):
    """A command cannot read a partition from an offset on."""

    def __init__(self, partition: Partition, failure: ReadFailure) -> None:
        halt = halt_of(partition, failure)
        action = "; leave them out with --from and --until" if halt.missing else f"; {halt.do}"
        super().__init__(f"{partition.topic}:{partition.partition}: {halt.text}{action}")
        self.partition = partition
        self.failure = failure
