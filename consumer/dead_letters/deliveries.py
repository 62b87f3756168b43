"""Makes deliveries of dead letters, as their handlers get them.

Takes rows that were read, and the handlers; reads nothing. Limitations: a row may have changed since; what is decided
on is read again under its lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consumer.core.dead_letter_seal import is_erased
from consumer.core.delivery import Delivery
from consumer.core.handler import Handler
from consumer.core.identity import OffsetId
from consumer.core.message import LogRecord
from consumer.core.outcome import Reason
from consumer.dead_letters.edits import altered_parts, how_to_repair
from consumer.dead_letters.session import DeadLetter
from consumer.transaction.identify import identify

# Reasons with a stand-in for an unknown id. If a change of the code makes the id known, that one counts.
_STAND_IN = {Reason.NO_MESSAGE_ID, Reason.AMBIGUOUS_MESSAGE_ID, Reason.BAD_HEADER, Reason.UNREADABLE, Reason.NO_VALUE}


def stored_delivery(
    dead_letter: DeadLetter, row: Any, app: str, handlers: Mapping[str, Handler]
) -> Delivery | tuple[str, str]:
    """Return a dead letter without its id, or why not.

    row: as dead_letter_queries.whole reads it; None if it is gone. The reason is an outcome and a text.
    """
    if row is None:
        return "gone", "there is no such dead letter any more"
    handler = handlers.get(row["handler_name"])
    if handler is None:
        return "no_handler", f"{app!r} has no handler {row['handler_name']!r} any more"
    edit = dead_letter.edit
    if is_erased(row):
        number = dead_letter.number
        return (
            "erased",
            f"its message was erased: it can only be discarded (`consumer dlq discard APP {number} --why TEXT`)",
        )
    if parts := altered_parts(row, edit):
        return (
            "altered",
            f"{' and '.join(parts)} not as its message had it; {how_to_repair(dead_letter.number, parts)}",
        )
    names = [name.decode("utf-8", "surrogateescape") for name in row["header_keys"]]
    record = LogRecord(
        topic=row["topic"],
        partition=row["partition"],
        # A new intent has no record in the log: its row of the ledger names the dead letter instead.
        offset=row["offset"] if edit is None or edit.new_id is None else -dead_letter.number,
        timestamp=row["timestamp"],
        key=row["key"],
        value=row["value"] if edit is None else edit.value,
        headers=tuple(zip(names, row["header_values"], strict=True)),
        fault="a header key that is not UTF-8" if any(not _is_text(name) for name in names) else "",
    )
    return Delivery(handler, record, attempts=row["attempts"])


def identified(dead_letter: DeadLetter, row: Any, delivery: Delivery) -> Delivery:
    """Return a dead letter as its handler gets it.

    delivery: as it is stored.
    """
    handler, record, attempts, edit = delivery.handler, delivery.record, delivery.attempts, dead_letter.edit
    by_offset = bool(identify([delivery])) or isinstance(handler.rule, OffsetId)
    if edit is not None and edit.new_id is not None:
        dead_letter.other_id = True
        return Delivery(handler, record, edit.new_id, delivery.fingerprint, attempts=attempts)
    own_id = row["id"].bytes
    if delivery.outcome is None and not by_offset and row["reason"] in _STAND_IN and delivery.id != own_id:
        dead_letter.other_id = True  # its id is known now
        return delivery
    return Delivery(handler, record, own_id, row["fingerprint"], attempts=attempts, outcome=delivery.outcome)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
