"""Liveness and readiness of the workers of one supervisor."""

from __future__ import annotations

import pytest

from consumer.metrics.catalog import PARTITION_STOPPED, RESTART_REASONS, SERVICE_WAITING
from consumer.metrics.fleet import Fleet, Phase
from consumer.metrics.recorder import Gauge, Recorder
from consumer.monitoring.status_page import status_of
from consumer.worker.restart_policy import EXIT_DEAD_LETTERS, EXIT_OUTGROWN, EXIT_STALLED, reason_of

pytestmark = pytest.mark.unit


def fleet_of_two() -> tuple[Fleet, list[int]]:
    fleet = Fleet.of("billing", 2)
    return fleet, [fleet.started(slot, 100 + slot) for slot in range(2)]


def with_gauges(fleet: Fleet, process: int, *gauges: Gauge) -> None:
    fleet.report(0, process, {"member": "m", "metrics": Recorder().beat(gauges)})


def test_ready_when_each_slot_has_joined_once() -> None:
    fleet, processes = fleet_of_two()
    assert fleet.not_live() == [] and len(fleet.not_ready()) == 2
    fleet.report(0, processes[0], {"member": "a", "batches": 3})
    fleet.report(1, processes[1], {"member": ""})
    assert fleet.not_ready() == ["worker 1 has not joined its group yet"]
    fleet.report(1, processes[1], {"member": "b"})
    assert fleet.not_ready() == [] and fleet.not_ready(strict=True) == []


def test_a_restart_and_an_outage_end_no_readiness_but_the_strict_one() -> None:
    fleet, processes = fleet_of_two()
    for slot in range(2):
        fleet.report(slot, processes[slot], {"member": "m"})
    with_gauges(
        fleet,
        processes[0],
        (SERVICE_WAITING, ("kafka",), 1.0),
        (SERVICE_WAITING, ("redis",), 0.0),
        (PARTITION_STOPPED, ("payments", "3", "recreated"), 1.0),
    )
    fleet.ended(1, processes[1], "killed")
    assert fleet.slots[1].phase is Phase.RESTARTING
    assert fleet.not_ready() == [] and fleet.not_live() == []
    assert fleet.not_ready(strict=True) == [
        "worker 1 has not joined its group yet",
        "waiting for kafka",
        "partition payments:3 has stopped: recreated",
    ]
    restarts = {labels[0]: value for (metric, labels), value in fleet.totals.counters().items() if value}
    assert restarts == {"killed": 1}


def test_not_live_once_a_slot_is_given_up_and_not_ready_while_stopping() -> None:
    fleet, processes = fleet_of_two()
    for slot in range(2):
        fleet.report(slot, processes[slot], {"member": "m"})
    fleet.given_up(0)
    assert fleet.not_live() == ["worker 0 has ended"]
    fleet.is_stopping = True
    assert fleet.not_live() == [] and fleet.not_ready() == ["the workers drain"]


def test_reports_of_an_earlier_process_are_dropped() -> None:
    fleet, processes = fleet_of_two()
    fleet.ended(0, processes[0], "failed")
    again = fleet.started(0, 200)
    fleet.report(0, processes[0], {"member": "old"})
    assert len(fleet.not_ready()) == 2
    fleet.report(0, again, {"member": "new", "batches": "not a number"})
    assert len(fleet.not_ready()) == 1 and fleet.slots[0].batches == 0


def test_status_of_a_fleet_without_reports() -> None:
    fleet, _ = fleet_of_two()
    answer = status_of(fleet)
    assert (answer["app"], answer["live"], answer["ready"]) == ("billing", True, False)
    assert [worker["state"] for worker in answer["workers"]] == ["starting", "starting"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "killed"),
        (1, "failed"),
        (0, "failed"),
        (2, "misconfigured"),
        (EXIT_STALLED, "stalled"),
        (EXIT_OUTGROWN, "memory"),
        (EXIT_DEAD_LETTERS, "dead_letters"),
    ],
)
def test_reasons_of_restarts(code: int, reason: str) -> None:
    assert reason_of(code) == reason and reason in RESTART_REASONS
