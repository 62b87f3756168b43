"""Chooses which offsets a rebuild replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consumer.core.message import Partition
from consumer.kafka.bounds import Span
from consumer.postgres import applied_queries
from consumer.postgres.protocol import Connection
from consumer.rebuild.ledger_history import LedgerHistory
from consumer.rebuild.result import RebuildResult
from consumer.rebuild.state import RebuildState, kafka_errors

_PLACES_SHOWN = 3
_GONE = "records were removed from the log, and a rebuild needs all of them, or --base"
_TOO_SHORT = "the log ends below the position, so the state comes from another log"
_NOTHING = "no message of these partitions has been settled, so there is nothing to compute a state from"


async def choose_spans(
    state: RebuildState,
    connection: Connection,
    positions: Mapping[Partition, int],
    history: LedgerHistory,
    result: RebuildResult,
) -> list[Span]:
    """Return the offsets that the real tables contain, of each partition.

    These are all offsets from the beginning of the log to the last settled message. Writes them to `result.ranges`, and what
    prevents a rebuild to `result.unknown`. Raises CannotTell for errors of Kafka.
    """
    with kafka_errors(state.settings):
        begins = await state.source.log.beginnings(state.partitions)
        ends = await state.source.log.ends(state.partitions)
    applied_beyond = await applied_queries.applied_beyond(
        connection,
        [(partition, positions.get(partition, begins[partition])) for partition in state.partitions],
        [handler.number for handler in state.handlers],
    )
    spans: list[Span] = []
    gone: list[str] = []
    too_short: list[str] = []
    for partition in state.partitions:
        begin, position = begins[partition], positions.get(partition)
        if position is None and partition in applied_beyond:  # a replay alone settled it: each message has a ledger row
            position = begin
        if position is None:
            spans.append(Span(partition, begin, begin))
            continue
        place = f"{partition.topic}:{partition.partition}"
        if position < begin or (begin > 0 and state.base is None):
            gone.append(f"{place} begins at offset {begin}")
        if position > ends[partition]:
            too_short.append(f"{place} ends at offset {ends[partition]} and its position is {position}")
        settled = max(position, applied_beyond.get(partition, 0), history.omitted.reach(partition))
        spans.append(Span(partition, begin, max(begin, min(ends[partition], settled))))
    _add_problem(result, "records_gone", gone, _GONE)
    _add_problem(result, "log_too_short", too_short, _TOO_SHORT)
    if not result.unknown and not any(span.length for span in spans):
        result.unknown.append({"kind": "nothing_settled", "count": len(state.partitions), "text": _NOTHING})
    result.ranges = [
        {"topic": span.partition.topic, "partition": span.partition.partition, "from": span.first, "until": span.end}
        for span in spans
    ]
    return spans


def _add_problem(result: RebuildResult, kind: str, places: Sequence[str], text: str) -> None:
    if places:
        hidden = len(places) - _PLACES_SHOWN
        more = f" and {hidden} more" if hidden > 0 else ""
        text = f"{text}: {', '.join(places[:_PLACES_SHOWN])}{more}"
        result.unknown.append({"kind": kind, "count": len(places), "text": text})
