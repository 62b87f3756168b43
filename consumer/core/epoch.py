"""Whether a database is one that has been left behind: the old primary after a failover, still alive. Knows epochs as text.

An epoch is ``system-timeline-nonce`` (see ledger.describe). PostgreSQL begins a timeline with a higher number whenever a
standby is promoted or a backup restored, so of two databases with one system identifier and one nonce, the one with
the lower timeline is the older. What is not known here: which of two databases is the right one when both are on the same
timeline, or before anybody has told of the newer one.
"""

from __future__ import annotations


def is_left_behind(epoch: str, seen: str) -> bool:
    """Whether `epoch` is of a history that had gone on, on another timeline, when `seen` was seen."""
    system, timeline, nonce = epoch.split("-")
    known_system, known_timeline, known_nonce = seen.split("-")
    return (system, nonce) == (known_system, known_nonce) and int(timeline, 16) < int(known_timeline, 16)
