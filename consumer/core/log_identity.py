"""Checks that a position still belongs to the log that is read.

Compares what is stored beside a position with the log as it is now; does no I/O. An offset is a number in one log: a
topic deleted and recreated, another cluster, or a log whose beginning was removed may have the same number for another
record, or none. Limitations: whether two logs with different ids have the same messages is unknown. So nothing is
guessed: a partition halts, and an operator decides how it continues.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import Literal, NamedTuple
from uuid import UUID

from consumer.core.message import Partition


class RecordFingerprint(NamedTuple):
    """A record's timestamp, in milliseconds, and fingerprint, at an offset."""

    offset: int
    timestamp: int
    fingerprint: int


class Position(NamedTuple):
    """A position: everything below `offset` is settled.

    It is an offset in the log that the ids name (None: not recorded). salt: mixed into ids that are derived from
    offsets; None for the first log of a name. seen: the last record settled. first: where the application began.
    """

    offset: int
    cluster_id: str | None = None
    topic_id: UUID | None = None
    salt: bytes | None = None
    seen: RecordFingerprint | None = None
    first: int | None = None
    handlers: str | None = None  # numbers of those that settle from here on; see handler_records/settled_ranges.py
    hold_count: int = 0  # holds by others than the partition's owner; see replay/session.py


NO_POSITION = Position(-1)  # of a partition that halted without a position


def commit_metadata(copied: Iterable[tuple[str, Position | None]]) -> str:
    """Return the metadata of an offset commit.

    It names the schema of each database, and where the application began in it. copied: a schema's installation (one
    word) and the position in it.
    """
    return " ".join(f"{word} {at.first}" for word, at in copied if word and at is not None and at.first is not None)


class ObservedLog(NamedTuple):
    """A partition's log as it is now; None: unknown.

    out_of_range: the broker refused the position. at_seen: the record at the offset of the last settled one (None: no
    record, which compaction and retention cause, so it proves nothing).
    """

    cluster_id: str | None = None
    topic_id: UUID | None = None
    first: int | None = None
    end: int | None = None
    out_of_range: bool = False
    at_seen: RecordFingerprint | None = None


class HaltReason(StrEnum):
    """Why a partition does not continue by itself."""

    OTHER_CLUSTER = "other_cluster"
    OTHER_TOPIC = "other_topic"
    RECORDS_REMOVED = "records_removed"
    BEYOND_THE_END = "beyond_the_end"
    OTHER_RECORD = "other_record"
    DAMAGED = "damaged"
    TOO_LARGE = "too_large"
    NOT_ALLOWED = "not_allowed"
    BROKER_ERROR = "broker_error"
    OTHER_DATABASE = "other_database"


class PartitionHalt(NamedTuple):
    """Why a partition halted, how it continues, the missing range.

    do: options of `consumer positions APP`; where no position helps, an instruction in words.
    """

    reason: HaltReason
    text: str
    do: str
    missing: tuple[int, int] | None = None  # first and last offset

    def command(self, path: str, suffix: str = "") -> str:
        """Return what to do so that the partition continues.

        path: how commands name the App.
        """
        return f"consumer positions {path} {self.do}{suffix}" if self.do.startswith("--") else self.do


class CommittedOffset(NamedTuple):
    """A committed offset of the group, and its metadata."""

    offset: int
    metadata: str = ""


class StartOffset(NamedTuple):
    """Where to begin a partition that has no position, and why there."""

    offset: int
    why: Literal["log", "lost", "shard", "group"]  # the log's beginning, our lost position, a new shard, another client


def decide_start(
    partition: Partition, committed: CommittedOffset | None, log_first: int, own: str, others: Collection[str] = ()
) -> StartOffset | PartitionHalt:
    """Decide where to begin without a position, or why to halt.

    own: the installation of the ledger. others: those of the App's other shards. A commit that names installations is a
    copy of positions in those ledgers. If this ledger is among them, a failover or a restore has lost its position
    together with the work below it. If one of them is gone, this database has replaced it, and it is unknown which
    messages its tables already have.
    """
    if committed is None:
        return StartOffset(log_first, "log")
    noted = _noted(committed.metadata)
    if own in noted:
        return StartOffset(max(noted[own], log_first), "lost")
    if set(noted) - set(others):
        return PartitionHalt(
            HaltReason.OTHER_DATABASE,
            f"another database holds the positions of this application: its group has committed {committed.offset} in Kafka, "
            "and this ledger knows nothing of what is below. Use that database again, or decide: --move-to earliest applies all "
            f"that the log still holds, --move-to committed goes on at {committed.offset} and applies nothing below",
            f"--topic {partition.topic} --partition {partition.partition} --move-to earliest",
        )
    return StartOffset(committed.offset, "shard" if noted else "group")


def _noted(text: str) -> dict[str, int]:
    """Return installations and where the application began in each.

    Empty for another client's metadata.
    """
    words = text.split(" ")
    if len(words) % 2 or not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        return {}
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def check_log(partition: Partition, known: Position, log: ObservedLog) -> PartitionHalt | None:
    """Return why the partition must not continue from its position, or None."""
    where = f"--topic {partition.topic} --partition {partition.partition}"
    adopt = f"{where} --adopt"
    if _differ(known.cluster_id, log.cluster_id):
        return PartitionHalt(
            HaltReason.OTHER_CLUSTER,
            f"the position {known.offset} is of the cluster {known.cluster_id}, and this is {log.cluster_id}: "
            "the same messages may have other offsets here",
            adopt,
        )
    if _differ(known.topic_id, log.topic_id):
        return PartitionHalt(
            HaltReason.OTHER_TOPIC,
            f"topic {partition.topic} was deleted and recreated: the position {known.offset} is of the topic with id "
            f"{known.topic_id}, and this one is {log.topic_id}",
            adopt,
        )
    if log.first is not None and known.offset < log.first:
        last = log.first - 1
        return PartitionHalt(
            HaltReason.RECORDS_REMOVED,
            f"the records {known.offset} to {last} were removed from the log before they were read",
            f"{where} --move-to {log.first}",
            (known.offset, last),
        )
    if log.out_of_range and log.end is not None and known.offset > log.end:
        return PartitionHalt(
            HaltReason.BEYOND_THE_END,
            f"the position {known.offset} lies beyond the log, which ends at {log.end}: its tail was lost "
            "(unclean leader election, restored broker), or it is another log",
            f"{where} --move-to earliest",
        )
    if known.seen is not None and log.at_seen is not None and known.seen != log.at_seen:
        return PartitionHalt(
            HaltReason.OTHER_RECORD,
            f"the record at offset {known.seen.offset} is not the one that was read there: the log was truncated and "
            "written again, or it is another one"
            + ("" if log.topic_id is not None else " (this broker has no topic ids)"),
            f"{where} --move-to earliest" if log.topic_id is not None else adopt,
        )
    return None


def _differ(known: object, seen: object) -> bool:
    return known is not None and seen is not None and known != seen
