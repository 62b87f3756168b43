"""The limit of a batch while transactions meet on the same rows."""

from consumer.core.batch_size import BatchSize


def test_conflicts_halve_the_size_down_to_one_message() -> None:
    size = BatchSize(1000)
    for expected in (500, 250, 125, 62, 31, 15, 7, 3, 1, 1):
        size.met(size.now)
        assert size.now == expected


def test_a_conflict_of_a_part_counts_with_the_size_of_the_part() -> None:
    size = BatchSize(1000)
    size.met(40)
    assert size.now == 20


def test_successes_bring_the_whole_size_back() -> None:
    size = BatchSize(1000)
    size.met(4)
    count = 0
    while size.now < 1000:
        before = size.now
        size.settled()
        assert before < size.now <= 1000
        count += 1
    assert count < 40
