"""The last look of a check: what workers have settled since the messages were read is no problem.

Knows the ledger through the check's connection and the findings; reads no log. A worker may be between any two steps of a check, so
what was missing, or had no dead letter yet, is asked again when everything else is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID

from consumer.postgres import dead_letter_queries
from consumer.replay.check import ReplayCheck
from consumer.replay.unsettled import UnsettledMessage

_AT_ONCE = 4096

_T = TypeVar("_T")


async def look_again(check: ReplayCheck, numbers: Mapping[str, int]) -> None:
    """Count what is settled by now as settled. numbers: of the handlers, by name."""
    for part in _parts(list(check.missing.items())):
        await _missing(check, numbers, part)
    for some in _parts(check.unsettled):
        await _without_letter(check, numbers, some)


async def _missing(check: ReplayCheck, numbers: Mapping[str, int], part: Sequence[Any]) -> None:
    findings = check.findings
    settled = await check.claimed_ids([(numbers[handler], id) for (handler, id), _ in part])
    for (handler, id), (partition, offset, timestamp, _) in part:
        outcome = "missing"
        if (numbers[handler], id) in settled:
            outcome = "applied"
            findings.count(handler, partition, "missing", -1)
            findings.count(handler, partition, "applied")
            findings.ahead -= findings.is_ahead(partition, offset)
            findings.drop_sample("missing", handler, partition, offset)
        findings.times.add([timestamp], outcome)


async def _without_letter(check: ReplayCheck, numbers: Mapping[str, int], part: Sequence[UnsettledMessage]) -> None:
    findings = check.findings
    asked = [(numbers[each.handler], UUID(bytes=each.id), f, place) for place, each in enumerate(part) for f in each.fingerprints]  # fmt: skip
    session = await check.open()
    settled = await dead_letter_queries.settled_places(session.connection, asked)
    for place, each in enumerate(part):
        if place in settled:
            findings.unsettled -= 1
            findings.drop_sample(each.kind, each.handler, each.partition, each.offset)
        else:
            findings.unsettled_ahead += findings.is_ahead(each.partition, each.offset)


def _parts(found: Sequence[_T]) -> Iterator[list[_T]]:
    left = iter(found)
    while part := list(islice(left, _AT_ONCE)):
        yield part
