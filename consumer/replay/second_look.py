"""Look again at the end of a check.

What workers have settled meanwhile is no problem. Asks through the check's connection, and never Kafka. Race: a worker
may be between any two steps of a check, so what was missing, or had no dead letter yet, is asked again when everything
else is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar
from uuid import UUID

from consumer.postgres import dead_letter_queries
from consumer.replay.check import MissingMessage, ReplayCheck
from consumer.replay.unsettled import UnsettledMessage

_AT_ONCE = 4096

_T = TypeVar("_T")


async def look_again(check: ReplayCheck, numbers: Mapping[str, int]) -> None:
    """Count what is settled by now as settled.

    numbers: of the handlers, by name.
    """
    for missing in _parts(list(check.missing.items())):
        await _count_missing(check, numbers, missing)
    for unsettled in _parts(check.unsettled):
        await _count_unsettled(check, numbers, unsettled)


async def _count_missing(
    check: ReplayCheck, numbers: Mapping[str, int], missing: Sequence[tuple[tuple[str, bytes], MissingMessage]]
) -> None:
    findings = check.findings
    claimed = await check.claimed_ids([(numbers[handler], id) for (handler, id), _ in missing])
    for (handler, id), message in missing:
        outcome = "missing"
        if (numbers[handler], id) in claimed:
            outcome = "applied"
            findings.count(handler, message.partition, "missing", -1)
            findings.count(handler, message.partition, "applied")
            findings.ahead -= findings.is_ahead(message.partition, message.offset)
            findings.drop_sample("missing", handler, message.partition, message.offset)
        findings.times.add([message.timestamp], outcome)


async def _count_unsettled(
    check: ReplayCheck, numbers: Mapping[str, int], unsettled: Sequence[UnsettledMessage]
) -> None:
    findings = check.findings
    asked = [
        (numbers[message.handler], UUID(bytes=message.id), fingerprint, index)
        for index, message in enumerate(unsettled)
        for fingerprint in message.fingerprints
    ]
    session = await check.open()
    settled = await dead_letter_queries.settled_places(session.connection, asked)
    for index, message in enumerate(unsettled):
        if index in settled:
            findings.unsettled -= 1
            findings.drop_sample(message.kind, message.handler, message.partition, message.offset)
        else:
            findings.unsettled_ahead += findings.is_ahead(message.partition, message.offset)


def _parts(items: Sequence[_T]) -> Iterator[list[_T]]:
    remaining = iter(items)
    while part := list(islice(remaining, _AT_ONCE)):
        yield part
