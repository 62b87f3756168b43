"""A provider behind HTTP charges once.

Whatever it does, and wherever workers are killed.

The judge is the provider's own journal: every order was charged once and its receipt applied once, or it is a dead letter
`effect_unknown`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import prefork
import pytest
from effects_worker import app_of
from harness import ROOT, Place, Sent, consume_all, query, until

SUPPORT = ROOT / "tests" / "support"
ORDERS = [
    *({"id": f"plain-{n}"} for n in range(4)),
    {"id": "late", "how": "late"},
    {"id": "fails", "how": "fails"},
    {"id": "down", "how": "down"},
    {"id": "dies-before", "dies": "before"},
    {"id": "dies-after", "dies": "after"},
    {"id": "dies-settled", "dies": "settled"},
    {"id": "forgotten", "how": "forgets"},
]
ASKING = [{"id": "plain-asking"}, {"id": "forgotten-asking", "how": "forgets"}]


class Provider:
    """The provider's process: its port and its journal."""

    def __init__(self, directory: Path) -> None:
        self._journal = directory / "journal"
        self._journal.touch()
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "charge_provider.py"), str(self._journal)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def charges(self) -> list[tuple[str, str]]:
        """Order and receipt of each charge."""
        lines = map(json.loads, self._journal.read_text("utf-8").splitlines())
        return [(line["order"], line["receipt"]) for line in lines]


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[Provider]:
    provider = Provider(tmp_path)
    yield provider
    provider.process.kill()
    provider.process.communicate()


async def killed(process: prefork.Process) -> None:
    async def gone() -> bool:
        return process.poll() is not None

    try:
        await until("the worker to be killed", gone, 120)
    finally:
        process.kill()
    assert await asyncio.to_thread(process.wait) == -9


async def test_every_order_is_charged_once_or_left_to_an_operator(
    place: Place, provider: Provider, tmp_path: Path
) -> None:
    await query(place.dsn, "create table charges (id text, receipt text)")
    topics = await place.topic(), await place.topic()
    settings = place.settings(kafka_session_timeout_seconds=2)
    arguments = [*topics, f"effects-{uuid.uuid4().hex[:8]}", str(provider.port), str(tmp_path), place.dsn]
    for topic, orders in zip(topics, (ORDERS, ASKING), strict=True):
        await place.send(topic, *[Sent(order, id=order["id"], key=order["id"]) for order in orders])
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CONSUMER_")}
    mortal = [order["id"] for order in ORDERS + ASKING if "dies" in order]
    with (tmp_path / "log").open("ab") as log:
        while not all((tmp_path / name).exists() for name in mortal):
            worker = [SUPPORT / "effects_worker.py", *arguments]
            environment = {**clean, **settings.dump(), "PYTHONPATH": str(ROOT)}
            await killed(prefork.start(worker, environment, log, stdout=log))
    await consume_all(app_of(*topics, arguments[2], provider.port, tmp_path, place.dsn), settings, 90)

    charges = provider.charges()
    assert [count for count in Counter(order for order, _ in charges).items() if count[1] != 1] == []
    applied = sorted(await query(place.dsn, "select id, receipt from charges"))
    dead = await query(
        place.dsn, "select convert_from(value, 'utf8')::json ->> 'id', reason from consumer.dead_letters"
    )
    assert dead == [("forgotten", "effect_unknown")]
    assert applied == sorted(charge for charge in charges if charge[0] != "forgotten")
    # The one that is left to an operator may not be charged: a kill came before its request.
    assert {order for order, _ in charges} | {"forgotten"} == {order["id"] for order in ORDERS + ASKING}
