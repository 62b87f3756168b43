"""When a position still means what it meant, and when a producer holds a partition back for long."""

from __future__ import annotations

from uuid import UUID

import pytest

from consumer.core.log_identity import Beginning, Committed, Log, Position, Print, Reason, Stop, begin, judge, note
from consumer.core.message import Partition
from consumer.worker.watchdog import OpenTransactions

pytestmark = pytest.mark.unit

P = Partition("payments", 3)
ONE, TWO = UUID(int=1), UUID(int=2)
SEEN = Print(9, 1000, 77)
KNOWN = Position(10, "cluster-a", ONE, None, SEEN)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (Log("cluster-a", ONE, 0, 10, at_print=SEEN), None),
        (Log(), None),  # nothing is known against it
        (Log("cluster-a", ONE, 10, 10), None),  # all that was removed had been read
        (Log("cluster-a", ONE, 0, 5), None),  # an end that lags, or lies: only a refused fetch counts
        (Log("cluster-a", ONE, 0, 10, at_print=None), None),  # compacted away
        (Log("cluster-b", ONE, 0, 10), Reason.OTHER_CLUSTER),
        (Log("cluster-b", TWO, 0, 10), Reason.OTHER_CLUSTER),
        (Log("cluster-a", TWO, 0, 10), Reason.OTHER_TOPIC),
        (Log(None, TWO, 50, 60), Reason.OTHER_TOPIC),  # the missing range of another topic means nothing
        (Log("cluster-a", ONE, 11, 20), Reason.RECORDS_REMOVED),
        (Log("cluster-a", ONE, 0, 9, out_of_range=True), Reason.BEYOND_THE_END),
        (Log("cluster-a", ONE, 0, 10, at_print=SEEN._replace(timestamp=1001)), Reason.OTHER_RECORD),
        (Log("cluster-a", ONE, 0, 10, at_print=SEEN._replace(fingerprint=78)), Reason.OTHER_RECORD),
    ],
)
def test_what_speaks_against_going_on(log: Log, reason: Reason | None) -> None:
    stop = judge(P, KNOWN, log)
    assert (stop and stop.reason) == reason
    if stop is not None:
        assert stop.do.startswith("--topic payments --partition 3 --")


def test_a_position_of_which_nothing_was_recorded_is_believed() -> None:
    assert judge(P, Position(10), Log("cluster-b", TWO, 0, 10, at_print=SEEN)) is None


def test_the_missing_range_is_exact_and_the_command_ends_at_it() -> None:
    stop = judge(P, KNOWN, Log("cluster-a", ONE, 15, 20))
    assert stop is not None
    assert stop.missing == (10, 14)
    assert "10 to 14" in stop.text
    assert stop.do == "--topic payments --partition 3 --to 15"


def test_the_same_topic_is_begun_again_where_another_one_is_adopted() -> None:
    """Ids made of offsets begin anew with an adoption, which would be wrong in the topic that they were made in."""
    other = SEEN._replace(fingerprint=78)
    same_topic = judge(P, KNOWN, Log("cluster-a", ONE, 0, 10, at_print=other))
    unknown = judge(P, KNOWN, Log(None, None, 0, 10, at_print=other))
    assert same_topic is not None and same_topic.do.endswith("--to earliest")
    assert unknown is not None and unknown.do.endswith("--adopt")


def test_an_open_transaction_is_told_once_and_its_end_too() -> None:
    watch = OpenTransactions()
    assert watch.changes(0.0, {P: 7}, 10) == ([], [])
    assert watch.changes(9.0, {P: 7}, 10) == ([], [])
    assert watch.changes(10.0, {P: 7}, 10) == ([P], [])
    assert watch.changes(30.0, {P: 7}, 10) == ([], [])
    assert watch.changes(31.0, {P: 8}, 10) == ([], [P])  # the next one is another
    assert watch.changes(41.0, {P: 8}, 10) == ([P], [])
    assert watch.changes(42.0, {}, 10) == ([], [P])
    assert watch.changes(43.0, {}, 10) == ([], [])


def test_a_transaction_that_moves_on_is_not_told() -> None:
    watch = OpenTransactions()
    for second in range(100):
        assert watch.changes(float(second), {P: second}, 10) == ([], [])


OWN, GONE, OTHER_SHARD = "1700000000000001", "1600000000000001", "1700000000000002"


@pytest.mark.parametrize(
    ("committed", "others", "expected"),
    [
        (None, (), Beginning(3, "log")),
        (Committed(90, ""), (), Beginning(90, "group")),
        (Committed(90, "written by another client"), (), Beginning(90, "group")),
        (Committed(90, "a b"), (), Beginning(90, "group")),
        (Committed(90, f"{OWN} 20"), (), Beginning(20, "lost")),
        (Committed(90, f"{OWN} 0"), (), Beginning(3, "lost")),  # the log has dropped its first records since
        (Committed(90, f"{GONE} 0"), (), Reason.OTHER_DATABASE),
        (Committed(90, f"{OTHER_SHARD} 0"), (OTHER_SHARD,), Beginning(90, "shard")),  # a shard that was added
        (Committed(90, f"{OTHER_SHARD} 0 {GONE} 0"), (OTHER_SHARD,), Reason.OTHER_DATABASE),  # swapped for this one
        (Committed(90, f"{OTHER_SHARD} 0 {OWN} 20"), (OTHER_SHARD,), Beginning(20, "lost")),
    ],
)
def test_beginning_without_a_position(
    committed: Committed | None, others: tuple[str, ...], expected: Beginning | Reason
) -> None:
    found = begin(P, committed, 3, OWN, others)
    if isinstance(expected, Beginning):
        assert found == expected
    else:
        assert isinstance(found, Stop) and found.reason is expected
        assert "--to earliest" in found.do and "--to committed" in found.text


def test_note_of_a_position_is_recognised_as_its_own() -> None:
    text = note([(OWN, Position(90, first=20)), (OTHER_SHARD, Position(80, first=10))])
    assert begin(P, Committed(90, text), 0, OWN) == Beginning(20, "lost")
    assert begin(P, Committed(90, text), 0, OTHER_SHARD) == Beginning(10, "lost")
