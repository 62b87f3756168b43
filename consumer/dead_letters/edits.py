"""Edits of dead letters: another payload under the same id, or another.

Pure: decides on rows that were read; retry.py runs edited dead letters. The bytes that a dead letter keeps never
change: a failed edit leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consumer.core.dead_letter_seal import REST, VALUE, altered
from consumer.core.identity import edit_id, message_id


@dataclass(frozen=True, slots=True)
class Edit:
    """Another payload for a dead letter.

    new_id: the 16 bytes of the message id of another intent; None: the same intent, under the same id.
    """

    value: bytes | None
    new_id: bytes | None = None


def edit_of(number: int, value: bytes | None, new_id: str | None) -> Edit:
    """Return an edit of the dead letter with this number.

    new_id: "auto" is derived from the number, so that the same command means the same intent.
    """
    if new_id is None:
        return Edit(value)
    return Edit(value, edit_id(number) if new_id == "auto" else message_id(new_id.encode("utf-8", "surrogateescape")))


def altered_parts(row: Any, edit: Edit | None) -> list[str]:
    """Return the stored parts that were changed and would be applied.

    An edit replaces the value, so a changed value does not matter then.
    """
    return [part for part in altered(row) or () if part == REST or edit is None]


def how_to_repair(number: int, parts: Sequence[str]) -> str:
    """Return what to do about a dead letter with changed parts."""
    if VALUE in parts and REST not in parts:
        return f"give the right one: `consumer dlq retry APP {number} --value FILE --same-id`, or discard it"
    return "discard it, and produce the message again"
