"""Saves and restores the state of an interrupted replay.

Imports run.py. resume.py says what must not have changed in between.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from consumer.core.errors import Misconfigured
from consumer.core.message import Partition
from consumer.kafka.consumer import KafkaConsumer
from consumer.replay import resume
from consumer.replay.check import MissingMessage, ReplayCheck
from consumer.replay.effects import sequences_moved
from consumer.replay.findings import Findings
from consumer.replay.run import Run
from consumer.replay.unsettled import UnsettledMessage


class Checkpoint:
    """The saved state of a replay."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._saved_at = time.monotonic()
        self._final: dict[str, Any] | None = None  # the state after the last record

    def save(self, *, force: bool = False) -> None:
        """Save the state, at most every few seconds."""
        run, now = self._run, time.monotonic()
        if run.progress.save is None or not run.reached():
            return
        if force or now - self._saved_at >= run.limits.save_seconds:
            self._saved_at = now
            run.progress.save(self._final or self._state())

    def freeze(self) -> None:
        """Keep the state of this moment for the rest of the run.

        What is checked again later must not count twice after a resume.
        """
        if self._run.progress.save is not None:
            self._final = json.loads(json.dumps(self._state()))

    async def read_last_sequences(self) -> None:
        """Read the sequences of connections that close before the replay has ended."""
        run = self._run
        if run.progress.save is None or run.findings.effects is None or run.has_read_sequences:
            return
        try:
            async with asyncio.timeout(run.limits.last_look_seconds):
                for lane in run.lanes:
                    if lane.checking is not None:
                        await lane.checking.rollback()
                        run.lost_sequences = run.lost_sequences or not lane.checking.is_usable
                await read_sequences(run)
        except (Exception, asyncio.CancelledError):
            run.lost_sequences = True

    async def restore(self, state: dict[str, Any], source: KafkaConsumer) -> None:
        """Continue from a saved state. Raises Misconfigured where that is not possible."""
        run = self._run
        resume.restore(state, run.conditions, self._restore)
        await resume.refuse_shorter_logs(source, run.findings.spans, run.resumed_at)

    def _state(self) -> dict[str, Any]:
        run = self._run
        return {
            "epoch": run.primary.epoch,
            "conditions": run.conditions,
            "reached": partition_rows(run.reached()),
            "counted": partition_rows(run.counted.before | run.counted.now),
            "positions": partition_rows(run.findings.positions),
            "findings": run.findings.as_state(),
            "dead_letters_before": run.dead_letters_before,
            "offset_ids": sorted(run.offset_ids),
            "lost_sequences": run.lost_sequences or not run.has_read_sequences,
            **_check_state(run.check),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        run, before = self._run, self._run.findings
        findings = run.findings = run.check.findings = Findings.from_state(state["findings"])
        findings.notes = [*before.notes, "resumed after an interruption"]
        findings.recoded = before.recoded
        findings.positions = by_partition(state["positions"])
        run.resumed_at = by_partition(state["reached"])
        run.counted.before = by_partition(state["counted"])
        run.dead_letters_before = state["dead_letters_before"]
        run.offset_ids = set(state["offset_ids"])
        run.lost_sequences = state["lost_sequences"]
        _restore_check(run.check, state)


async def read_sequences(run: Run) -> None:
    """Add the sequences that the checking connections have moved to the findings."""
    effects = run.findings.effects
    assert effects is not None
    run.has_read_sequences = True
    if run.settings.postgres_pooler:
        effects.uncounted = "sequences were not looked at, because sessions behind a pooler are not ours"
        return
    moved = set(effects.sequences)
    for lane in run.lanes:
        if lane.checking is not None and lane.checking.is_usable:
            moved |= set(await sequences_moved(lane.checking.connection))
    effects.sequences = sorted(moved)


def partition_rows(offsets: Mapping[Partition, int]) -> list[list[Any]]:
    """Return offsets by partition as JSON can hold them."""
    return [[*partition, offset] for partition, offset in offsets.items()]


def by_partition(rows: Sequence[Sequence[Any]]) -> dict[Partition, int]:
    """Return offsets by partition, from what `partition_rows` returned."""
    return {Partition(topic, number): offset for topic, number, offset in rows}


def _check_state(check: ReplayCheck) -> dict[str, Any]:
    return {
        "matched": [[name, *partition, block, n] for (name, partition, block), n in check.matched.items()],
        "missing": [
            [name, id.hex(), *message.partition, message.offset, message.timestamp, message.fingerprint]
            for (name, id), message in check.missing.items()
        ],
        "settled_elsewhere": [
            [name, id.hex(), *partition, offset] for (name, id), (partition, offset) in check.settled_elsewhere.items()
        ],
        "dead_letters_seen": [
            [name, id.hex(), fingerprint, *partition, offset]
            for (name, id, fingerprint), (partition, offset) in check.dead_letters_seen.items()
        ],
        "overflow": check.overflow,
        "would": check.would,
        "unsettled": [message.as_state() for message in check.unsettled],
    }


def _restore_check(check: ReplayCheck, state: Mapping[str, Any]) -> None:
    """Restore what `_check_state` returned.

    Raises Misconfigured where not all of it could be kept.
    """
    if state["overflow"]:
        raise Misconfigured(
            "--resume: more was seen before the interruption than can be checked again "
            f"({state['overflow']}); run it without --resume"
        )
    check.matched = {(name, Partition(topic, number), block): n for name, topic, number, block, n in state["matched"]}
    if not check.applies:  # messages that were being applied are found missing again
        check.missing = {
            (name, bytes.fromhex(id)): MissingMessage(Partition(topic, number), offset, timestamp, fingerprint)
            for name, id, topic, number, offset, timestamp, fingerprint in state["missing"]
        }
    check.settled_elsewhere = {
        (name, bytes.fromhex(id)): (Partition(topic, number), offset)
        for name, id, topic, number, offset in state["settled_elsewhere"]
    }
    check.dead_letters_seen = {
        (name, bytes.fromhex(id), fingerprint): (Partition(topic, number), offset)
        for name, id, fingerprint, topic, number, offset in state["dead_letters_seen"]
    }
    check.would = dict(state["would"])
    check.unsettled = [UnsettledMessage.from_state(row) for row in state["unsettled"]]
