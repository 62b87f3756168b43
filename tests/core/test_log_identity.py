"""When a position is valid, and when a transaction blocks its partition."""

from __future__ import annotations

from uuid import UUID

import pytest

from consumer.core.log_identity import (
    CommittedOffset,
    HaltReason,
    ObservedLog,
    PartitionHalt,
    Position,
    RecordFingerprint,
    StartOffset,
    check_log,
    commit_metadata,
    decide_start,
)
from consumer.core.message import Partition
from consumer.worker.watchdog import OpenTransactions

pytestmark = pytest.mark.unit

P = Partition("payments", 3)
ONE, TWO = UUID(int=1), UUID(int=2)
SEEN = RecordFingerprint(9, 1000, 77)
KNOWN = Position(10, "cluster-a", ONE, None, SEEN)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (ObservedLog("cluster-a", ONE, 0, 10, at_seen=SEEN), None),
        (ObservedLog(), None),  # nothing is known against it
        (ObservedLog("cluster-a", ONE, 10, 10), None),  # all that was removed had been read
        (ObservedLog("cluster-a", ONE, 0, 5), None),  # an end that lags, or lies: only a refused fetch counts
        (ObservedLog("cluster-a", ONE, 0, 10, at_seen=None), None),  # compacted away
        (ObservedLog("cluster-b", ONE, 0, 10), HaltReason.OTHER_CLUSTER),
        (ObservedLog("cluster-b", TWO, 0, 10), HaltReason.OTHER_CLUSTER),
        (ObservedLog("cluster-a", TWO, 0, 10), HaltReason.OTHER_TOPIC),
        (ObservedLog(None, TWO, 50, 60), HaltReason.OTHER_TOPIC),  # the missing range of another topic means nothing
        (ObservedLog("cluster-a", ONE, 11, 20), HaltReason.RECORDS_REMOVED),
        (ObservedLog("cluster-a", ONE, 0, 9, out_of_range=True), HaltReason.BEYOND_THE_END),
        (ObservedLog("cluster-a", ONE, 0, 10, at_seen=SEEN._replace(timestamp=1001)), HaltReason.OTHER_RECORD),
        (ObservedLog("cluster-a", ONE, 0, 10, at_seen=SEEN._replace(fingerprint=78)), HaltReason.OTHER_RECORD),
    ],
)
def test_reason_to_stop_is_decided_by_log_and_last_record(log: ObservedLog, reason: HaltReason | None) -> None:
    stop = check_log(P, KNOWN, log)
    assert (stop and stop.reason) == reason
    if stop is not None:
        assert stop.do.startswith("--topic payments --partition 3 --")


def test_position_without_a_recorded_log_is_accepted() -> None:
    assert check_log(P, Position(10), ObservedLog("cluster-b", TWO, 0, 10, at_seen=SEEN)) is None


def test_the_missing_range_is_exact_and_the_command_ends_at_it() -> None:
    stop = check_log(P, KNOWN, ObservedLog("cluster-a", ONE, 15, 20))
    assert stop is not None
    assert stop.missing == (10, 14)
    assert "10 to 14" in stop.text
    assert stop.do == "--topic payments --partition 3 --move-to 15"


def test_the_same_topic_is_begun_again_where_another_one_is_adopted() -> None:
    """Ids that are offsets start again with an adoption.

    That would be wrong in the topic where they were given.
    """
    other = SEEN._replace(fingerprint=78)
    same_topic = check_log(P, KNOWN, ObservedLog("cluster-a", ONE, 0, 10, at_seen=other))
    unknown = check_log(P, KNOWN, ObservedLog(None, None, 0, 10, at_seen=other))
    assert same_topic is not None and same_topic.do.endswith("--move-to earliest")
    assert unknown is not None and unknown.do.endswith("--adopt")


def test_open_transaction_and_its_end_are_reported_once() -> None:
    watch = OpenTransactions()
    assert watch.changes(0.0, {P: 7}, 10) == ([], [])
    assert watch.changes(9.0, {P: 7}, 10) == ([], [])
    assert watch.changes(10.0, {P: 7}, 10) == ([P], [])
    assert watch.changes(30.0, {P: 7}, 10) == ([], [])
    assert watch.changes(31.0, {P: 8}, 10) == ([], [P])  # the next one is another
    assert watch.changes(41.0, {P: 8}, 10) == ([P], [])
    assert watch.changes(42.0, {}, 10) == ([], [P])
    assert watch.changes(43.0, {}, 10) == ([], [])


def test_transaction_that_moves_on_is_not_reported() -> None:
    watch = OpenTransactions()
    for second in range(100):
        assert watch.changes(float(second), {P: second}, 10) == ([], [])


OWN, GONE, OTHER_SHARD = "1700000000000001", "1600000000000001", "1700000000000002"


@pytest.mark.parametrize(
    ("committed", "others", "expected"),
    [
        (None, (), StartOffset(3, "log")),
        (CommittedOffset(90, ""), (), StartOffset(90, "group")),
        (CommittedOffset(90, "written by another client"), (), StartOffset(90, "group")),
        (CommittedOffset(90, "a b"), (), StartOffset(90, "group")),
        (CommittedOffset(90, f"{OWN} 20"), (), StartOffset(20, "lost")),
        (CommittedOffset(90, f"{OWN} 0"), (), StartOffset(3, "lost")),  # the log has dropped its first records since
        (CommittedOffset(90, f"{GONE} 0"), (), HaltReason.OTHER_DATABASE),
        (CommittedOffset(90, f"{OTHER_SHARD} 0"), (OTHER_SHARD,), StartOffset(90, "shard")),  # a shard that was added
        (
            CommittedOffset(90, f"{OTHER_SHARD} 0 {GONE} 0"),
            (OTHER_SHARD,),
            HaltReason.OTHER_DATABASE,
        ),  # swapped for this one
        (CommittedOffset(90, f"{OTHER_SHARD} 0 {OWN} 20"), (OTHER_SHARD,), StartOffset(20, "lost")),
    ],
)
def test_start_without_a_position_is_decided_by_commit_and_database(
    committed: CommittedOffset | None, others: tuple[str, ...], expected: StartOffset | HaltReason
) -> None:
    decision = decide_start(P, committed, 3, OWN, others)
    if isinstance(expected, StartOffset):
        assert decision == expected
    else:
        assert isinstance(decision, PartitionHalt) and decision.reason is expected
        assert "--move-to earliest" in decision.do and "--move-to committed" in decision.text


def test_note_of_a_position_is_recognized_as_its_own() -> None:
    text = commit_metadata([(OWN, Position(90, first=20)), (OTHER_SHARD, Position(80, first=10))])
    assert decide_start(P, CommittedOffset(90, text), 0, OWN) == StartOffset(20, "lost")
    assert decide_start(P, CommittedOffset(90, text), 0, OTHER_SHARD) == StartOffset(10, "lost")
