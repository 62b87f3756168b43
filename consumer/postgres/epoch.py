"""Compares epochs: which history of which database a connection sees.

An epoch is the text ``system-timeline-nonce-started``. PostgreSQL raises the timeline whenever a standby is promoted or
a backup is recovered to a point in time; `consumer migrate --new-epoch` changes the nonce; `started` is the server's
start time. A server restored from a copy of its disk keeps system and timeline, but it was started again: so it is
another epoch. "0" stands for a part that a server refuses to read. Limitations: of two servers on one timeline, the
right one is unknown. A virtual machine that was restored with its memory is not detected (run `consumer migrate
--new-epoch` then).
"""

from __future__ import annotations

UNKNOWN = "0"


def is_left_behind(epoch: str, seen: str) -> bool:
    """Return whether `epoch` is an older timeline of the database of `seen`."""
    system, timeline, nonce, *_ = epoch.split("-")
    known_system, known_timeline, known_nonce, *_ = seen.split("-")
    if UNKNOWN in (system, timeline, known_timeline):
        return False
    return (system, nonce) == (known_system, known_nonce) and int(timeline, 16) < int(known_timeline, 16)


def lineage(epoch: str) -> str:
    """Return the epoch without the start time, which a plain restart changes."""
    return "-".join(epoch.split("-")[:3])
