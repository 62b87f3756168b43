"""A route is asked, and remembered while it is consistent."""

from __future__ import annotations

import zlib

import pytest

from consumer.core.message import LogRecord
from consumer.core.shard_route import RouteFault, Router, check_names, explain_change, shown

pytestmark = pytest.mark.unit

NAMES = ("east", "west", "north")


def by_crc(key: bytes | None) -> str:
    return NAMES[zlib.crc32(key or b"") % 3]


def record(offset: int, key: bytes | None) -> LogRecord:
    return LogRecord("t", 0, offset, 0, key, b"", ())


def test_records_go_to_their_shards_in_their_order() -> None:
    records = [record(n, None if n % 7 == 0 else str(n % 5).encode()) for n in range(50)]
    parts = Router(NAMES, by_crc).split(records)
    assert sorted([record.offset for part in parts for record in part]) == list(range(50))
    for name, part in zip(NAMES, parts, strict=True):
        assert [record.offset for record in part] == sorted(record.offset for record in part)
        assert {by_crc(record.key) for record in part} <= {name}


def test_without_a_route_everything_is_one_shards() -> None:
    records = [record(0, b"a"), record(1, None)]
    assert Router(("",), None).split(records) == [records]


def test_two_answers_for_one_key_are_a_fault_whenever_they_come() -> None:
    answers = iter(["east", "west"])
    with pytest.raises(RouteFault, match=r"answers 'west' for key [0-9a-f]{8} \(.*1 bytes\), and answered 'east'"):
        Router(NAMES, lambda _: next(answers)).shard_of(b"k")
    later = iter(["east", "east", "east", "west"])
    router = Router(NAMES, lambda _: next(later))
    assert [router.shard_of(b"k") for _ in range(2)] == ["east", "east"]
    with pytest.raises(RouteFault, match=r"t:0:9, which was not applied"):
        router.split([record(9, b"k")])


@pytest.mark.parametrize("answer", ["south", None, 1, b"east", ["east"], ""])
def test_an_answer_that_names_no_shard_is_a_fault(answer: object) -> None:
    with pytest.raises(RouteFault, match="none of east, west, north"):
        Router(NAMES, lambda _: answer).shard_of(b"k")  # type: ignore[arg-type, return-value]


def test_a_fault_quotes_neither_the_error_nor_a_messages_key() -> None:
    with pytest.raises(RouteFault, match=r"raises ValueError for key [0-9a-f]{8} ") as raised:
        Router(NAMES, lambda key: NAMES[int(key or b"")]).shard_of(b"iban-7")
    with pytest.raises(RouteFault, match="answers a str for key") as answered:
        Router(NAMES, lambda key: f"shard-{key!r}").shard_of(b"iban-7")
    moved = explain_change("billing", (b"iban-7", "east", "west"))
    for said in (str(raised.value), str(answered.value), moved):
        assert "iban" not in said and "invalid literal" not in said


def test_probes_distinguish_a_route_from_any_other() -> None:
    probes = Router(NAMES, by_crc).fixed_probes()
    assert Router(NAMES, by_crc).changed(probes) is None
    turned = Router(NAMES, lambda key: NAMES[(zlib.crc32(key or b"") + 1) % 3])
    key, then, now = turned.changed(probes) or (b"", "", "")
    assert (then, now) == (by_crc(key), turned.shard_of(key))
    assert "--new-route" in explain_change("billing", (key, then, now))
    assert len(probes) > 60 and None in probes and set(probes.values()) == set(NAMES)
    keyless = Router(NAMES, lambda key: "north" if key is None else by_crc(key))
    assert keyless.changed(probes) == (None, by_crc(None), "north")


def test_keys_of_what_was_applied_are_kept_once_and_up_to_a_bound() -> None:
    router = Router(NAMES, by_crc)
    router.applied("east", [record(0, b"too early")])
    router.start_recording("east", 3)
    mine = [key for n in range(50) if by_crc(key := str(n).encode()) == "east"]
    for key in mine:
        router.shard_of(key)
    assert router.to_record("east") == []  # asked for, and not applied
    router.applied("east", [record(0, mine[0]), record(1, None), record(2, mine[0])])
    assert router.to_record("east") == mine[:1]
    router.applied("east", [record(3, mine[0]), *(record(n, key) for n, key in enumerate(mine * 2))])
    assert router.to_record("east") == mine[1:3]
    assert router.to_record("east") == router.to_record("west") == []


def test_names_and_keys_are_shown_as_they_can_be_read() -> None:
    assert check_names(["east", "eu-west_1"]) is None
    for wrong in ("", "1st", "a b", "a'b", "ä", None):
        assert check_names(["east", wrong]) is not None  # type: ignore[list-item]
    assert shown(None).startswith("None")
    assert shown(b"") == "''" and shown(b"key-3") == "'key-3'"
    assert shown(b"x" * 500).endswith("(BLAKE2b-32 of its 500 bytes)")
