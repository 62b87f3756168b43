"""`make pictures`: takes the pictures of docs/how-to/console.md in Chromium."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from console_process import TABLES, console, invoice, write_app  # noqa: E402
from harness import as_worker, migrated, new_topic, produce, query, settings_for, until, working  # noqa: E402
from services import Kafka  # noqa: E402
from shop_browser import Browser  # noqa: E402

from consumer.admin import pauses  # noqa: E402
from consumer.admin.ledger_access import with_ledger  # noqa: E402
from consumer.app_loader import load_app  # noqa: E402
from consumer.core.audit import ActedBy  # noqa: E402
from consumer.local_servers import Postgres  # noqa: E402

TARGET = ROOT / "docs" / "img"
TRAFFIC_SECONDS = 75.0
APP, TOPIC = "billing", "invoices"


async def traffic(kafka: str) -> None:
    """Send invoices for a while: some twice, some that fail."""
    drawn = random.Random(7)
    begun_at, number = time.monotonic(), 0
    while time.monotonic() - begun_at < TRAFFIC_SECONDS:
        some = [
            invoice(f"i{number + n}", "12.50", f"customer-{drawn.randrange(500)}")
            for n in range(drawn.randrange(300, 900))
        ]
        number += len(some)
        some += drawn.sample(some, len(some) // 12)
        await produce(kafka, TOPIC, some)
        if drawn.random() < 0.3:
            await produce(
                kafka, TOPIC, [invoice(f"p{number}", "12,50", "customer-7"), invoice(f"q{number}", "1", "customer-7")]
            )
        await asyncio.sleep(1)


async def take(browser: Browser, kafka: Kafka, postgres: Postgres, directory: Path) -> None:
    await migrated(postgres.dsn(), TABLES)
    await new_topic(kafka.bootstrap_servers, 3, TOPIC)
    environment = {"CONSOLE_APP": APP, "CONSOLE_TOPIC": TOPIC}
    os.environ |= environment
    os.chdir(directory)
    write_app(directory)
    app = load_app("invoicing:app")
    settings = settings_for(as_worker(postgres.dsn()), kafka.bootstrap_servers, log_level="error")
    by = ActedBy("ada", "the accounts of March are corrected")
    async with working(app, settings), console(settings, directory, "--actions", **environment) as (address, _):
        await traffic(kafka.bootstrap_servers)
        target = pauses.Target(APP, TOPIC, 1)
        await with_ledger(settings, lambda connection: pauses.pause(connection, target, by))
        await asyncio.sleep(6)  # until the worker obeys: from then on messages wait
        for _ in range(6):
            await produce(
                kafka.bootstrap_servers, TOPIC, [invoice(f"l{random.random()}", "1", str(n)) for n in range(400)]
            )
            await asyncio.sleep(1)

        async def dead() -> list[tuple[int, ...]]:
            return await query(postgres.dsn(), "select min(dead_letter) from consumer.dead_letters having count(*) > 1")

        letter = (await until("dead letters", dead))[0][0]
        for name, path, scheme, width, height in (
            ("console-partitions", "/", "light", 1100, 520),
            ("console-handlers", "/handlers", "dark", 1100, 760),
            ("console-phone", f"/dead-letters/{letter}", "light", 360, 780),
        ):
            await asyncio.to_thread(picture, browser, address + path, scheme, (width, height), TARGET / f"{name}.png")


def picture(browser: Browser, address: str, scheme: str, size: tuple[int, int], path: Path) -> None:
    with browser.visitor(*size) as visitor:
        tab = visitor.tab(address)
        tab.media(prefers_color_scheme=scheme)
        tab.until("document.querySelector('main table, main pre') !== null")
        tab.png(path, whole=False)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    browser = Browser()
    try:
        with Kafka() as kafka, Postgres() as postgres, tempfile.TemporaryDirectory() as directory:
            sys.path.insert(0, directory)
            asyncio.run(take(browser, kafka, postgres, Path(directory)))
    finally:
        browser.close()


if __name__ == "__main__":
    main()
