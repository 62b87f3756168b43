"""`consumer console` as a process, for an App with a faulty handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from harness import Command, Sent, running

from consumer import Settings

TABLES = "create table invoices (id text not null, cents bigint not null);   -- no key: doubles must show\n"
_APP = """
import os

from consumer import App, Retry, Tx

app = App(os.environ["CONSOLE_APP"])
TOPIC = os.environ["CONSOLE_TOPIC"]


def cents(text: str) -> int:
    return {convert}


@app.handler(TOPIC, name="settle", retry=Retry(attempts=1))
async def settle(invoice: dict[str, str], tx: Tx) -> None:
    tx.defer("insert into invoices values ($1, $2)", invoice["id"], cents(invoice["amount"]))


@app.handler(TOPIC, name="count", idempotent=False)
async def count(invoice: dict[str, str]) -> None: ...
"""
FAULTY, MENDED = "int(float(text) * 100)", 'round(float(text.replace(",", ".")) * 100)'


def write_app(directory: Path, convert: str = FAULTY) -> None:
    """Write the module `invoicing`: its handler as it is, or mended."""
    (directory / "invoicing.py").write_text(_APP.format(convert=convert))


def invoice(id: str, amount: str, key: str | None = None, partition: int | None = None) -> Sent:
    return Sent({"id": id, "amount": amount}, id=id, key=key, partition=partition)


@asynccontextmanager
async def console(
    settings: Settings, directory: Path, *arguments: str, **environment: str
) -> AsyncIterator[tuple[str, Command]]:
    """Run it on a free port; yields its address, and the command."""
    listen = ["--listen", "127.0.0.1:0"]
    async with running(
        ["console", "invoicing:app", *listen, *arguments], settings, directory, **environment
    ) as command:
        stdout = command.process.stdout
        assert stdout is not None
        line = await asyncio.to_thread(stdout.readline)
        assert "http://" in line, command.errors
        yield line.split()[3], command
