"""Check that the ledger still has the rows of edited dead letters.

A dead letter that was edited under a new id is applied with a row that names the dead letter in place of an offset
(minus its number). No record of the log accounts for such a row; the recorded edit does, with the new id and value.
Reads through the connection that the caller gives, and never Kafka.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from consumer.core.dead_letters import edit_fault
from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.message import LogRecord
from consumer.decoders.preparation import fetch_schemas
from consumer.postgres import dead_letter_queries, generations
from consumer.postgres.dead_letter_queries import Selection
from consumer.postgres.protocol import Connection
from consumer.replay.findings import EDITED, Findings
from consumer.replay.wording import problem
from consumer.settings import Settings
from consumer.transaction.identify import by_bytes, identify

_EDITS_AT_ONCE = 500


async def check(
    connection: Connection,
    findings: Findings,
    handlers: Mapping[int, Handler],
    selection: Selection,
    settings: Settings,
) -> None:
    """Count edits whose ledger row is gone, or another one.

    handlers: by number.
    """
    findings.drop_samples(EDITED)  # of the part before an interruption
    has_forgotten = await generations.has_forgotten(connection)
    last_action, forgotten = 0, 0
    while rows := await dead_letter_queries.edits_under_new_ids(
        connection, selection, after=last_action, limit=_EDITS_AT_ONCE
    ):
        last_action = rows[-1]["action"]
        for row in rows:
            handler = handlers[row["handler"]]
            known = await _fingerprints(handler, row, settings)
            fault = edit_fault(row["applied"], row["fingerprint"], known)
            if fault and row["fingerprint"] is None and has_forgotten:
                forgotten += 1
            elif fault:
                _count(findings, handler, row, fault)
    if forgotten:
        text = (
            f"{forgotten:,} dead letters were applied under a new id, and the ledger, which has dropped old rows, has none of "
            "that id: whether it was deleted is unknown"
        )
        findings.doubts.append(problem("edits_forgotten", forgotten, text))


async def _fingerprints(handler: Handler, row: Any, settings: Settings) -> Collection[int]:
    """Return the fingerprints that the edit may have in the ledger.

    There are none where its value is not kept.
    """
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
    await fetch_schemas([delivery], settings)
    identify([delivery])
    return {delivery.fingerprint, by_bytes(delivery).fingerprint}


def _count(findings: Findings, handler: Handler, row: Any, fault: str) -> None:
    findings.edits_changed += 1
    findings.sample_dead_letter(EDITED, handler.name, row, row["new_id"], fault)
