"""What `/status` answers: the state of the workers of one supervisor.

docs/reference/json.md is its contract. It holds what the workers have reported, so it answers in any outage.
"""

from __future__ import annotations

from typing import Any

from consumer.metrics.catalog import (
    LAG_MESSAGES,
    LAG_SECONDS,
    MESSAGES,
    PARTITION_STOPPED,
    SERVICE_WAITING,
    WAITING,
    WORKER_RESTARTS,
)
from consumer.metrics.fleet import Fleet


def status_of(fleet: Fleet) -> dict[str, Any]:
    """Return the status of a fleet, as JSON can hold it."""
    gauges = fleet.totals.gauges()
    return {
        "app": fleet.app,
        "live": not fleet.not_live(),
        "ready": not fleet.not_ready(),
        "stopping": fleet.is_stopping,
        "workers": [
            {
                "worker": number,
                "state": slot.phase.value,
                "pid": slot.pid,
                "restarts": slot.restarts,
                "batches": slot.batches,
            }
            for number, slot in enumerate(fleet.slots)
        ],
        "restarts": {
            labels[0]: int(value)
            for (metric, labels), value in fleet.totals.counters().items()
            if metric is WORKER_RESTARTS and value
        },
        "handlers": _handlers(fleet),
        "partitions": _partitions(fleet),
        "waiting": [
            {"handler": labels[0], "topic": labels[1], "reason": labels[2], "messages": int(value)}
            for (metric, labels), value in sorted(gauges.items(), key=lambda item: item[0][1])
            if metric is WAITING
        ],
        "services_waited_for": sorted(
            labels[0] for (metric, labels), value in gauges.items() if metric is SERVICE_WAITING and value
        ),
    }


def _handlers(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """Count what was settled since the supervisor began, by handler."""
    handlers: dict[str, dict[str, Any]] = {}
    for (metric, labels), value in sorted(fleet.totals.counters().items(), key=lambda item: item[0][1]):
        if metric is not MESSAGES or not value:
            continue
        handler, _, outcome, cause = labels
        counts = handlers.setdefault(handler, {"applied": 0, "duplicates": {}, "dead_lettered": {}, "skipped": 0})
        by_cause = {"duplicate": "duplicates", "dead_lettered": "dead_lettered"}.get(outcome)
        if by_cause is None:
            counts[outcome] = counts.get(outcome, 0) + int(value)
        else:
            counts[by_cause][cause] = counts[by_cause].get(cause, 0) + int(value)
    return handlers


def _partitions(fleet: Fleet) -> list[dict[str, Any]]:
    """Return the partitions that workers own or have stopped."""
    partitions: dict[tuple[str, int], dict[str, Any]] = {}
    for (metric, labels), value in fleet.totals.gauges().items():
        if metric not in (LAG_MESSAGES, LAG_SECONDS, PARTITION_STOPPED):
            continue
        topic, number = labels[0], int(labels[1])
        empty = {"topic": topic, "partition": number, "lag": None, "lag_seconds": None, "stopped": None}
        partition = partitions.setdefault((topic, number), empty)
        if metric is LAG_MESSAGES:
            partition["lag"] = int(value)
        elif metric is LAG_SECONDS:
            partition["lag_seconds"] = round(value, 3)
        else:
            partition["stopped"] = labels[2]
    return [partition for _, partition in sorted(partitions.items())]
