"""What the log says of messages that were not simply applied: where each is and why, and never what is in it.

Knows outcomes and the log. What it does not know: whether anybody reads it; the ledger and the dead letters hold the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from consumer import once
from consumer.core.coverage import Change, Changes
from consumer.core.errors import RunAgain
from consumer.core.lanes import Delivery
from consumer.core.outcome import Dead, Duplicate, Outcome, Parked
from consumer.ledger import sqlstate_of
from consumer.logs import describe, event, log

_TOLD_MAX = 20  # failures of one batch, one line each


def failures(done: once.Settlement) -> None:
    """A line for each message of a batch that failed, up to a bound, and one for the rest."""
    told = [
        each
        for each, outcome in done.outcomes.items()
        if (isinstance(outcome, Dead) and outcome is not once.HELD_BACK) or each in done.errors
    ]
    for delivery in told[:_TOLD_MAX]:
        failure(delivery, done.errors.get(delivery), done.outcomes[delivery])
    if len(told) > _TOLD_MAX:
        event(logging.WARNING, "more messages failed in the same batch", count=len(told) - _TOLD_MAX)


def failure(delivery: Delivery, error: BaseException | None, outcome: Outcome | None) -> None:
    """A line for a message that failed: it is a dead letter now, or is tried again."""
    fields = _where(delivery)
    if error is not None:
        fields |= {"error": describe(error), "sqlstate": sqlstate_of(error)}
    if isinstance(outcome, Dead):
        event(logging.WARNING, "dead letter", reason=outcome.reason.value, do="consumer dlq list", **fields)
    elif isinstance(outcome, Parked):
        event(
            logging.INFO if isinstance(error, RunAgain) else logging.WARNING,
            "schema or rights do not fit the handler; its message waits, uncounted"
            if error is not None and not isinstance(error, RunAgain) and once.is_uncounted(error)
            else "handler failed; the message is tried again",
            attempts=delivery.attempts,
            delay_seconds=round(outcome.delay_seconds, 3),
            **fields,
        )


def duplicates(done: once.Settlement) -> None:
    """At level debug: the ledger counts duplicates, and keeps none of them."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    for delivery, outcome in done.outcomes.items():
        if isinstance(outcome, Duplicate):
            event(logging.DEBUG, "duplicate", **_where(delivery), cause=outcome.cause.value)


def _where(delivery: Delivery) -> dict[str, Any]:
    record = delivery.record
    return {
        "handler": delivery.handler.name,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
    }


def changes(found: Changes, names: Mapping[int, str], path: str, label: Mapping[str, str]) -> None:
    """Log which handlers begin behind the application, and which ones this worker lacks."""
    for handler, topics in _by_handler(found.late):
        name = names.get(handler, str(handler))
        event(
            logging.WARNING,
            "a handler begins behind the application: it has not settled what is before",
            handler=name,
            topics=", ".join(topics),
            do=f"consumer replay {path} {' '.join(topics)} --apply --handler {name} fills it; "
            f"consumer positions {path} --handler {name} --begin-here leaves it",
            **label,
        )
    for handler, topics in _by_handler(found.ended):
        event(
            logging.WARNING,
            "this worker lacks a handler that the ledger knows: what it settles is missing for that handler",
            handler=names.get(handler, str(handler)),
            topics=", ".join(topics),
            do="deploy one version of the App; another service needs another App name; a renamed handler: "
            "consumer migrate --rename-handler APP OLD NEW",
            **label,
        )


def _by_handler(found: Iterable[Change]) -> list[tuple[int, list[str]]]:
    topics: dict[int, set[str]] = {}
    for each in found:
        topics.setdefault(each.handler, set()).add(each.partition.topic)
    return [(handler, sorted(names)) for handler, names in sorted(topics.items())]
