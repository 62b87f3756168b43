"""Check that the dead letters of a range still hold their records.

Reads through the connection that the caller gives, and never Kafka. core/dead_letter_seal.py says what is covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consumer.core.dead_letter_seal import altered
from consumer.core.handler import Handler
from consumer.postgres import dead_letter_queries
from consumer.postgres.dead_letter_queries import Selection
from consumer.postgres.protocol import Connection
from consumer.replay.findings import ALTERED, Findings

_AT_ONCE = 500  # dead letters
_BYTES_AT_ONCE = 16 << 20


async def check(
    connection: Connection, findings: Findings, handlers: Mapping[int, Handler], selection: Selection
) -> None:
    """Count dead letters that hold another record than their message's.

    handlers: by number.
    """
    findings.drop_samples(ALTERED)  # of the part before an interruption
    sizes = await dead_letter_queries.sealed_sizes(connection, selection)
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
        findings.sample_dead_letter(ALTERED, handler.name, row, row["id"], " and ".join(parts))
