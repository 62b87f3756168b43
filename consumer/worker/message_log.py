"""Logs messages that were not simply applied, never their content.

Failures are logged by handler and kind of error: the first one at once, then one line with a count, ever less often.
The ledger and the dead letters hold what the log leaves out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from consumer.core.delivery import Delivery
from consumer.core.errors import RunAgain
from consumer.core.outcome import Dead, Duplicate, Outcome, RetryLater
from consumer.error_places import error_summary
from consumer.handler_records.notices import filling
from consumer.handler_records.settled_ranges import HandlerChange, HandlerChanges
from consumer.logs import event, log
from consumer.postgres.errors import sqlstate_of
from consumer.transaction.result import BEHIND_DEAD_LETTER, BatchResult

_FIRST_SECONDS = 5.0  # after the first line of a kind; then twice as long each time
_MOST_SECONDS = 600.0
_KINDS_MAX = 1000  # beyond, the oldest is forgotten, so that its next failure is logged at once
_DEAD_EACH_MAX = 20  # dead letters of one batch and kind that are logged one by one

OFFSET_IDS = (
    "messages without an id: their offset is used, which does not recognize a message that was produced twice, "
    "copied to another topic or restored; set a message-id header, or message_id= of the handler"
)
RETRIED = "handler failed; the message is tried again"
WAITS = "waits, uncounted: not known to be the message's fault"
ASKED = "the handler asked for its message to be run again"


@dataclass(slots=True)
class _Kind:
    """Repeated lines of one kind: their count, and when one is due."""

    level: int
    text: str
    due: float
    pause: float = _FIRST_SECONDS
    count: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


class MessageLog:
    """The log of one worker.

    now, in its methods: monotonic seconds, passed by tests.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def log_rarely(
        self, level: int, text: str, key: tuple[object, ...], fields: dict[str, Any], count: int = 1, now: float = 0.0
    ) -> None:
        """Log the first event of a kind at once; count later ones.

        The count is logged ever less often.
        """
        now = now or time.monotonic()
        kind = self._kinds.get((text, *key))
        if kind is None:
            if len(self._kinds) >= _KINDS_MAX:
                self._kinds.pop(next(iter(self._kinds)))
            self._kinds[text, *key] = _Kind(level, text, now + _FIRST_SECONDS)
            event(level, text, count=count, **fields)
            return
        kind.count += count
        kind.fields = fields
        if now >= kind.due:
            self._log(kind, now)

    def flush(self, now: float = 0.0, *, is_last: bool = False) -> None:
        """Log the kinds that are due, or all at the end.

        Forgets those that have not occurred for a while.
        """
        now = now or time.monotonic()
        for key, kind in list(self._kinds.items()):
            if kind.count and (is_last or now >= kind.due):
                self._log(kind, now)
            elif not kind.count and now >= kind.due + kind.pause:
                del self._kinds[key]

    def _log(self, kind: _Kind, now: float) -> None:
        event(kind.level, kind.text, count=kind.count, **kind.fields)
        kind.count = 0
        kind.pause = min(_MOST_SECONDS, kind.pause * 2)
        kind.due = now + kind.pause

    def log_failures(self, result: BatchResult) -> None:
        """Log a batch's dead letters and the messages that are retried."""
        by_kind: dict[tuple[object, ...], list[tuple[Delivery, BaseException | None, Outcome]]] = {}
        for delivery, outcome in result.outcomes.items():
            if (isinstance(outcome, Dead) and outcome is not BEHIND_DEAD_LETTER) or delivery in result.failures:
                failure = result.failures.get(delivery)
                error = None if failure is None else failure.error
                key = (delivery.handler.name, type(outcome), _error_text(delivery, error, outcome))
                by_kind.setdefault(key, []).append((delivery, error, outcome))
        for failures in by_kind.values():
            lines = _DEAD_EACH_MAX if isinstance(failures[0][2], Dead) else 0
            for delivery, error, outcome in failures[:lines]:
                self.log_failure(delivery, error, outcome)
            if rest := failures[lines:]:
                self.log_failure(*rest[-1], count=len(rest))

    def log_failure(
        self, delivery: Delivery, error: BaseException | None, outcome: Outcome | None, count: int = 1
    ) -> None:
        """Log a failed message, which is a dead letter now or waits.

        count: how many like it this line stands for.
        """
        fields = _place(delivery)
        if error is not None:
            fields |= {"error": _error_text(delivery, error, outcome), "sqlstate": sqlstate_of(error)}
        if isinstance(outcome, Dead):
            fields |= {"reason": outcome.reason.value, "do": "consumer dlq list APP"}
            if count == 1:
                event(logging.WARNING, "dead letter", **fields)
            else:
                event(logging.WARNING, "more dead letters of the same kind", count=count, **fields)
        elif isinstance(outcome, RetryLater):
            asked = isinstance(error, RunAgain)
            counted = error is None or (
                delivery.failure_cause is not None and not delivery.failure_cause.systemic and not asked
            )
            self.log_rarely(
                logging.INFO if asked else logging.WARNING,
                ASKED if asked else RETRIED if counted else WAITS,
                (delivery.handler.name, fields.get("error")),
                {**fields, "attempts": delivery.attempts, "delay_seconds": round(outcome.delay_seconds, 3)},
                count,
            )


def log_duplicates(result: BatchResult) -> None:
    """Log duplicates at level debug.

    The ledger counts them, and keeps none of them.
    """
    if not log.isEnabledFor(logging.DEBUG):
        return
    for delivery, outcome in result.outcomes.items():
        if isinstance(outcome, Duplicate):
            event(logging.DEBUG, "duplicate", **_place(delivery), cause=outcome.cause.value)


def _error_text(delivery: Delivery, error: BaseException | None, outcome: Outcome | None) -> str:
    if error is not None:
        return error_summary(error, delivery.handler.place)
    return outcome.reason.value if isinstance(outcome, Dead) else "unknown"


def _place(delivery: Delivery) -> dict[str, Any]:
    record = delivery.record
    return {
        "handler": delivery.handler.name,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
    }


def log_handler_changes(changes: HandlerChanges, app: str, path: str, label: Mapping[str, str]) -> None:
    """Log handlers that begin behind the application or that are missing here."""
    names = changes.names
    for number, topics in _topics_by_handler(changes.late):
        name = names.get(number, str(number))
        old = {names.get(ended.handler, "") for ended in changes.ended if ended.partition.topic in topics}
        event(
            logging.WARNING,
            "a handler begins behind the application: it has not settled what is before",
            handler=name,
            topics=", ".join(topics),
            do=filling(path, topics, name, old, app),
            **label,
        )
    for number, topics in _topics_by_handler(changes.ended):
        event(
            logging.WARNING,
            "this worker lacks a handler that the ledger knows: what it settles is missing for that handler",
            handler=names.get(number, str(number)),
            topics=", ".join(topics),
            do="deploy one version of the App; another service needs another App name; a renamed handler: "
            f"consumer migrate {app} --rename-handler {names.get(number, 'OLD')} NEW",
            **label,
        )


def _topics_by_handler(changes: Iterable[HandlerChange]) -> list[tuple[int, list[str]]]:
    topics: dict[int, set[str]] = {}
    for change in changes:
        topics.setdefault(change.handler, set()).add(change.partition.topic)
    return [(handler, sorted(names)) for handler, names in sorted(topics.items())]
