"""Whether the dead letters of a range still hold the records that they were made of.

Reads letters through the connection that the caller gives; knows no Kafka. core/dead_letter_seal.py says what is covered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

from consumer.core.dead_letter_seal import altered
from consumer.core.handler import Handler
from consumer.replay.findings import ALTERED, Findings

_AT_A_TIME = 500  # letters
_BYTES_AT_A_TIME = 16 << 20

_SIZES = """
select d.dead_letter, coalesce(octet_length(d.value), 0)::int8
from consumer.dead_letters d join unnest($2::text[], $3::int4[], $4::int8[], $5::int8[]) as s(topic, partition, first, past)
  on d.topic = s.topic and d.partition = s.partition and d."offset" >= s.first and d."offset" < s.past
where d.handler = any($1) and ($6::bytea is null or d.key = $6) and ($7::uuid[] is null or d.id = any($7))
order by d.dead_letter
"""
_LETTERS = """
select dead_letter, handler, id, fingerprint, topic, partition, "offset", "timestamp", key, value, header_keys, header_values, seal
from consumer.dead_letters where dead_letter = any($1) order by dead_letter
"""


async def check(
    connection: Any,
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
    rows = await connection.fetch(
        _SIZES,
        list(handlers),
        [each.partition.topic for each in spans],
        [each.partition.partition for each in spans],
        [each.first for each in spans],
        [each.end for each in spans],
        key,
        None if ids is None else [UUID(bytes=each) for each in ids],
    )
    some: list[int] = []
    size = 0
    for place, (number, length) in enumerate(rows, 1):
        some.append(number)
        size += length
        if len(some) == _AT_A_TIME or size >= _BYTES_AT_A_TIME or place == len(rows):
            for letter in await connection.fetch(_LETTERS, some):
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
