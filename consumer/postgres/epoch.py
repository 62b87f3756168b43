"""Compares epochs: which history of which database a connection sees.

Epochs are text.

An epoch is ``system-timeline-nonce-started``. PostgreSQL raises the timeline whenever a standby is promoted or a backup
is recovered to a point in time; `consumer migrate --new-epoch` changes the nonce; `started` is the server's start time.
A server that was put back from a copy of its disk keeps system and timeline, but it was started: so it is another epoch.
"0" stands for what a server does not tell. Limitations: which of two servers on one timeline is the right one cannot be
known, nor can a virtual machine that was put back with its memory (run `consumer migrate --new-epoch` then).
"""

from __future__ import annotations

UNKNOWN = "0"


def is_left_behind(epoch: str, seen: str) -> bool:
    """Whether `epoch` is an older timeline of the same database than `seen`."""
    system, timeline, nonce, *_ = epoch.split("-")
    known_system, known_timeline, known_nonce, *_ = seen.split("-")
    if UNKNOWN in (system, timeline, known_timeline):
        return False
    return (system, nonce) == (known_system, known_nonce) and int(timeline, 16) < int(known_timeline, 16)


def lineage(epoch: str) -> str:
    """The epoch without the start time: a plain restart of the server keeps it."""
    return "-".join(epoch.split("-")[:3])
