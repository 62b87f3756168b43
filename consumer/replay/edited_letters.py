"""Whether the ledger still has what dead letters became that were edited under a new id.

Such a row names its letter in place of an offset (minus its number), so no record of the log accounts for it; the trace of the
letter does, with the new id and value. Reads them through the connection that the caller gives; knows no Kafka.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

from consumer.core.dead_letters import edit_fault
from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.message import LogRecord
from consumer.postgres import dead_letter_queries, generations
from consumer.postgres.protocol import Connection
from consumer.replay.findings import EDITED, Findings
from consumer.transaction.identify import by_bytes, identify

_EDITS_AT_ONCE = 500


async def check(
    connection: Connection,
    findings: Findings,
    handlers: Mapping[int, Handler],
    key: bytes | None,
    ids: Collection[bytes] | None,
) -> None:
    """Count the edits of the range whose row is gone or another one. handlers, key, ids: as for the letters themselves."""
    findings.samples = [each for each in findings.samples if each["kind"] != EDITED]  # of a run that was interrupted
    forgets = await generations.has_forgotten(connection)
    spans = findings.spans
    ranges = dead_letter_queries.Ranges.of(spans)
    wanted = None if ids is None else [UUID(bytes=id) for id in ids]
    last, forgotten = 0, 0
    while rows := await dead_letter_queries.edits_under_new_ids(
        connection, list(handlers), ranges, key, wanted, after=last, limit=_EDITS_AT_ONCE
    ):
        last = rows[-1]["action"]
        for row in rows:
            handler = handlers[row["handler"]]
            fault = edit_fault(row["applied"], row["fingerprint"], _fingerprints(handler, row))
            if fault and row["fingerprint"] is None and forgets:
                forgotten += 1
            elif fault:
                _count(findings, handler, row, fault)
    if forgotten:
        text = (
            f"{forgotten:,} dead letters were applied under a new id, and the ledger, which has forgotten old rows, has none of "
            "that id: whether it was deleted cannot be told"
        )
        findings.doubts.append({"kind": "edits_forgotten", "count": forgotten, "text": text})


def _fingerprints(handler: Handler, row: Any) -> Collection[int]:
    """The fingerprints that an edited letter may have in the ledger; none where its value is not kept."""
    if row["new_value"] is None:
        return ()
    names = [name.decode("utf-8", "surrogateescape") for name in row["header_keys"]]
    record = LogRecord(
        topic=row["topic"],
        partition=row["partition"],
        offset=-row["dead_letter"],
        timestamp=row["timestamp"],
        key=row["key"],
        value=row["new_value"],
        headers=tuple(zip(names, row["header_values"], strict=True)),
    )
    delivery = Delivery(handler, record)
    identify([delivery])
    return {delivery.fingerprint, by_bytes(delivery).fingerprint}


def _count(findings: Findings, handler: Handler, row: Any, fault: str) -> None:
    findings.edits_changed += 1
    findings.sample(
        EDITED,
        handler=handler.name,
        topic=row["topic"],
        partition=row["partition"],
        offset=row["offset"],
        id=row["new_id"].hex,
        detail=f"letter {row['dead_letter']}: {fault}",
    )
