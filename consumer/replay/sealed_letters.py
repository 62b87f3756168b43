"""Whether the dead letters of a range still hold the records that they were made of.

Reads letters through the connection that the caller gives; knows no Kafka. core/dead_letter_seal.py says what is covered.
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

_AT_A_TIME = 500  # letters
_BYTES_AT_A_TIME = 16 << 20


async def check(
    connection: Connection,
    findings: Findings,
    handlers: Mapping[int, Handler],
    key: bytes | None,
    ids: Collection[bytes] | None,
) -> None:
    """Count the letters of the range in `findings` that hold another record than their message's, with examples.

    handlers: by their numbers. key, ids: only of these, None for all.
    """
    spans = findings.spans
    findings.samples = [each for each in findings.samples if each["kind"] != ALTERED]  # of a run that was interrupted
    ranges = dead_letter_queries.Ranges.of(spans)
    wanted = None if ids is None else [UUID(bytes=id) for id in ids]
    rows = await dead_letter_queries.sealed_sizes(connection, list(handlers), ranges, key, wanted)
    some: list[int] = []
    size = 0
    for place, (number, length) in enumerate(rows, 1):
        some.append(number)
        size += length
        if len(some) == _AT_A_TIME or size >= _BYTES_AT_A_TIME or place == len(rows):
            for letter in await dead_letter_queries.sealed(connection, some):
                _judge(findings, handlers[letter["handler"]], letter)
            some, size = [], 0


def _judge(findings: Findings, handler: Handler, letter: Any) -> None:
    if parts := altered(letter):
        findings.altered += 1
        findings.sample(
            ALTERED,
            handler=handler.name,
            topic=letter["topic"],
            partition=letter["partition"],
            offset=letter["offset"],
            id=letter["id"].hex,
            detail=f"letter {letter['dead_letter']}: {' and '.join(parts)}",
        )
