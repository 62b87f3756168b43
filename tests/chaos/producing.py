"""Sends what workload.py plans, through all faults, and keeps a journal.

The journal says what it meant to send and what it knows. Three answers, as in Jepsen: *ok* (in the log, at this
offset), *fail* (it never will be: its transaction was aborted), *info* (unknown). A line is on the disk before its
message is sent. It never gives up, and never waits for ever.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from aiokafka import AIOKafkaProducer

from chaos.workload import Burst, Planned, fingerprint

_SECONDS = 6.0


class Producing:
    """A task of its own: `run` until `stop` is set."""

    def __init__(self, servers: str, topic: str, journal: Path, pause_seconds: float) -> None:
        self._servers = servers
        self._topic = topic
        self._path = journal
        self._pause = pause_seconds
        self._clients: dict[bool, AIOKafkaProducer] = {}
        self._transactional_id = f"chaos-{uuid4().hex[:8]}"
        self.sent = 0

    async def run(self, bursts: Iterator[Burst], stop: asyncio.Event) -> None:
        with self._path.open("a") as self._journal:
            while not stop.is_set():
                await self._send(next(bursts))
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), self._pause)
            # A transaction that hangs would hold back everything after it: a new epoch of its producer aborts it.
            await self._drop(True)
            for _ in range(10):
                with suppress(Exception):
                    await self._client(True)
                    break
                await asyncio.sleep(0.5)
            for client in list(self._clients):
                await self._drop(client)

    async def _send(self, burst: Burst) -> None:
        self._write([self._line(n, message, "sent") for n, message in enumerate(burst.messages, self.sent)])
        outcome: list[str | int] = ["info"] * len(burst.messages)
        transactional = bool(burst.ending)
        ended = False
        try:
            async with asyncio.timeout(_SECONDS):
                producer = await self._client(transactional)
                if transactional:
                    await producer.begin_transaction()
                futures = []
                for message in burst.messages:
                    headers = [("message-id", message.id.encode())]
                    futures.append(
                        await producer.send(
                            self._topic,
                            message.value,
                            key=message.key.encode(),
                            partition=message.partition,
                            headers=headers,
                        )
                    )
                for n, answer in enumerate(await asyncio.gather(*futures, return_exceptions=True)):
                    if not isinstance(answer, BaseException):
                        outcome[n] = answer.offset
                if burst.ending == "commit":
                    await producer.commit_transaction()
                elif burst.ending == "abort":
                    await producer.abort_transaction()
                ended = True
        except Exception:
            await self._drop(transactional)
        if burst.ending == "abort":
            outcome = ["fail"] * len(outcome)  # whether or not the answer came: it is never committed
        elif transactional and not ended:
            outcome = ["info"] * len(outcome)
        self._write(
            [self._line(n, message, outcome[n - self.sent]) for n, message in enumerate(burst.messages, self.sent)]
        )
        self.sent += len(burst.messages)

    async def _client(self, transactional: bool) -> AIOKafkaProducer:
        if transactional not in self._clients:
            more: dict[str, Any] = {"linger_ms": 2, "acks": "all"}
            if transactional:
                more = {"transactional_id": self._transactional_id, "transaction_timeout_ms": 4000}
            producer = AIOKafkaProducer(bootstrap_servers=self._servers, request_timeout_ms=4000, **more)
            try:
                await asyncio.wait_for(producer.start(), _SECONDS)
            except BaseException:
                await self._stopped(producer)
                raise
            self._clients[transactional] = producer
        return self._clients[transactional]

    async def _drop(self, transactional: bool) -> None:
        producer = self._clients.pop(transactional, None)
        if producer is not None:
            await self._stopped(producer)

    async def _stopped(self, producer: AIOKafkaProducer) -> None:
        with suppress(Exception):
            await asyncio.wait_for(producer.stop(), 3)

    def _line(self, number: int, planned: Planned, outcome: str | int) -> dict[str, Any]:
        state = "ok" if isinstance(outcome, int) else outcome
        offset = outcome if isinstance(outcome, int) else None
        line = {
            "n": number,
            "id": planned.id,
            "partition": planned.partition,
            "hash": fingerprint(planned.value),
            "state": state,
        }
        return (
            line
            | ({"kind": planned.kind} if state == "sent" else {})
            | ({"offset": offset} if offset is not None else {})
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._journal.write("".join(json.dumps(line) + "\n" for line in lines))
        self._journal.flush()
        os.fsync(self._journal.fileno())


def read(journal: Path) -> dict[int, dict[str, Any]]:
    """The last that is known of each message, by number."""
    latest: dict[int, dict[str, Any]] = {}
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        latest[entry["n"]] = latest.get(entry["n"], {}) | entry
    return latest
