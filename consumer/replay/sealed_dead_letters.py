"""Check that the dead letters of a range still hold their records.

Reads through the connection that the caller gives, and never Kafka. core/dead_letter_seal.py says what is covered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

from consumer.core.dead_letter_seal import altered
from consumer.core.handler import Handler
from consumer.postgres import dead_letter_queries
from consumer.postgres.protocol import Connection
from consumer.replay.findings import ALTERED, Findings

_AT_ONCE = 500  # dead letters
_BYTES_AT_ONCE = 16 << 20


async def check(
    connection: Connection,
    findings: Findings,
    handlers: Mapping[int, Handler],
    key: bytes | None,
    ids: Collection[bytes] | None,
) -> None:
    """Count dead letters that hold another record than their message's.

    handlers: by number. key, ids: only of these, None for all.
    """
    findings.drop_samples(ALTERED)  # of the part before an interruption
    ranges = dead_letter_queries.Ranges.of(findings.spans)
    wanted = None if ids is None else [UUID(bytes=id) for id in ids]
    sizes = await dead_letter_queries.sealed_sizes(connection, list(handlers), ranges, key, wanted)
    numbers: list[int] = []
    size = 0
    for count, (number, length) in enumerate(sizes, 1):
        numbers.append(number)
        size += length
        if len(numbers) == _AT_ONCE or size >= _BYTES_AT_ONCE or count == len(sizes):
            for row in await dead_letter_queries.sealed(connection, numbers):
                _check_one(findings, handlers[row["handler"]], row)
            numbers, size = [], 0


def _check_one(findings: Findings, handler: Handler, row: Any) -> None:
    if parts := altered(row):
        findings.altered += 1
        findings.sample(
            ALTERED,
            handler=handler.name,
            topic=row["topic"],
            partition=row["partition"],
            offset=row["offset"],
            id=row["id"].hex,
            detail=f"dead letter {row['dead_letter']}: {' and '.join(parts)}",
        )
