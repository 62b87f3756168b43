"""The console in real Chromium, beside a worker.

A fault is found and mended, and its messages are retried. Kafka and PostgreSQL go away meanwhile, and come back.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from console_process import MENDED, TABLES, console, invoice, write_app
from harness import as_worker, migrated, new_topic, produce, query, settings_for, until, working
from proxy import Proxy
from services import Kafka
from shop_browser import Browser, Tab

from consumer.app_loader import load_app
from consumer.local_servers import Postgres

WHY = "a comma is a decimal point there"


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that the test may stop."""
    with Postgres({"fsync": "off"}) as server:
        yield server


def fits(tab: Tab) -> bool:
    """Whether nothing is wider than the page."""
    return bool(tab.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def follow(tab: Tab, text: str) -> None:
    """Follow the link with this text, by keyboard."""
    links = "[...document.querySelectorAll('a, button')]"
    tab.js(f"{links}.find(link => link.textContent.trim() === {json.dumps(text)}).focus()")
    tab.key("Enter", loads=True)


def says(tab: Tab, text: str) -> None:
    tab.until(f"document.body.innerText.includes({json.dumps(text)})", 120)


def says_no_more(tab: Tab, text: str) -> None:
    tab.until(f"document.body.innerText !== '' && !document.body.innerText.includes({json.dumps(text)})", 120)


def find_and_mend(tab: Tab, directory: Path, address: str) -> None:
    """From the first page to the retry, as an operator goes."""
    says(tab, "settle has dead letters")
    follow(tab, "Look at them")
    says(tab, "ValueError")
    assert "they follow those before them" in tab.text()
    assert "1,50" not in tab.text() and "float: '…'" in tab.text()
    tab.js(
        "[...document.querySelectorAll('td a')].find(link => /^[0-9]+$/.test(link.textContent)).focus()"
    )  # its first
    tab.key("Enter", loads=True)
    says(tab, "Waiting behind it")
    assert "2 wait for it" in tab.text() and "invoicing.py" in tab.js("document.body.textContent")
    assert "1,50" not in tab.js("document.querySelector('.message')?.textContent ?? ''")
    follow(tab, "Show the message")
    says(tab, '"amount": "1,50"')
    says(tab, "customer-7")
    write_app(directory, MENDED)  # deployed: the console runs on
    follow(tab, tab.js("document.querySelector('dd a[href*=group]').textContent"))
    follow(tab, "Retry this group")
    tab.js("document.querySelector('input[name=why]').focus()")
    tab.call("Input.insertText", text=WHY)
    tab.key("Enter", loads=True)  # in a field: sends the form
    tab.until("location.pathname.startsWith('/jobs/')")
    says(tab, "Done,")
    says(tab, "it waited behind")
    assert tab.complaints() == [], tab.complaints()


def looks_right_everywhere(browser: Browser, address: str, letter: int) -> None:
    """Check each page on a phone, light and dark."""
    with browser.visitor(width=360, height=740) as phone:
        tab = phone.tab(address)
        for path in (
            *("/", "/handlers", "/dead-letters?state=all", f"/dead-letters/{letter}", "/outbox", "/replays"),
            *("/audit", "/jobs", "/pause"),
        ):
            tab.goto(address + path)
            assert fits(tab), path
            assert tab.js("document.querySelectorAll('h1').length") == 1
        for scheme in ("light", "dark"):
            tab.media(prefers_color_scheme=scheme)
            back = tab.js("getComputedStyle(document.body).backgroundColor")
            assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        assert tab.complaints() == [], tab.complaints()
        tab.goto(address + "/handlers")
        tab.until("document.querySelector('figure .plot svg rect') !== null")
        assert tab.js("document.querySelector('figure .plot svg').getBoundingClientRect().width") > 100


def is_refused_from_elsewhere(browser: Browser, address: str) -> None:
    """A page of another site sends a form: it changes nothing."""
    form = f"<form method=post action='{address}/pause'><input name=target><input name=why value=x><button>go</button></form>"
    with browser.visitor() as visitor:
        tab = visitor.tab(f"data:text/html,{form.replace('#', '%23')}")
        tab.click("button", loads=True)
        assert "the form comes from another site" in tab.text()


@pytest.mark.timeout(600)  # many steps, each of them quick
async def test_operator_finds_mends_and_retries(
    browser: Browser, kafka: Kafka, own_postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrated(own_postgres.dsn(), TABLES)
    topic, name = await new_topic(kafka.bootstrap_servers), f"invoicing-{uuid4().hex[:8]}"
    environment = {"CONSOLE_APP": name, "CONSOLE_TOPIC": topic}
    for variable, text in environment.items():
        monkeypatch.setenv(variable, text)
    write_app(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    app = load_app("invoicing:app")
    dsn = as_worker(own_postgres.dsn())
    settings = settings_for(dsn, kafka.bootstrap_servers)
    # The console reaches Kafka through a proxy, which can refuse it; a port of Kafka's own leads there.
    through = settings.model_copy(update={"kafka_bootstrap_servers": f"127.0.0.1:{kafka.proxy}"})

    async def send(*invoices: Any) -> None:
        await produce(kafka.bootstrap_servers, topic, invoices)

    async def settled() -> list[tuple[Any, ...]]:
        return await query(own_postgres.dsn(), "select id, cents from invoices order by id")

    async with (
        Proxy(kafka.proxied, "kafka", kafka.proxy) as proxy,
        working(app, settings),
        console(through, tmp_path, "--actions", **environment) as (address, command),
    ):
        await send(
            invoice("a1", "1,50", "customer-7"), invoice("a2", "2.00", "customer-7"), invoice("a3", "3", "customer-7")
        )
        await send(*(invoice(f"b{number}", "4") for number in range(20)))

        async def all_is_done() -> bool:
            open_letters = await query(
                own_postgres.dsn(), "select count(*) from consumer.dead_letters where state <> 'applied'"
            )
            return len(await settled()) == 20 and open_letters == [(3,)]

        await until("the worker to settle what it can", all_is_done, 120)
        letter = (await query(own_postgres.dsn(), "select min(dead_letter) from consumer.dead_letters"))[0][0]
        with browser.visitor() as visitor:
            tab = await asyncio.to_thread(visitor.tab, address)
            await asyncio.to_thread(find_and_mend, tab, tmp_path, address)
            assert [row for row in await settled() if row[0].startswith("a")] == [("a1", 150), ("a2", 200), ("a3", 300)]
            recorded = await query(
                own_postgres.dsn(),
                "select action, why from consumer.audit where dead_letter = $1 order by entry",
                letter,
            )
            assert recorded == [("dlq view", ""), ("dlq retry", WHY)]
            await asyncio.to_thread(looks_right_everywhere, browser, address, letter)
            await asyncio.to_thread(is_refused_from_elsewhere, browser, address)

            await asyncio.to_thread(tab.goto, address)
            proxy.refuse()
            proxy.reset()
            await asyncio.to_thread(says, tab, "Kafka does not answer")
            assert "Ends and lags are of" in tab.text() and topic in tab.text()
            await proxy.accept()
            await asyncio.to_thread(says_no_more, tab, "Kafka does not answer")

            await asyncio.to_thread(own_postgres.kill)
            await asyncio.to_thread(says, tab, "PostgreSQL does not answer")
            assert topic in tab.text() and "up to date" in tab.text()
            await asyncio.to_thread(follow, tab, "Dead letters")
            assert "PostgreSQL does not answer" in tab.js("document.querySelector('h1').textContent")
            await asyncio.to_thread(own_postgres.run)
            await asyncio.to_thread(own_postgres.wait)
            await asyncio.to_thread(says, tab, "No dead letter matches")  # the page loads again by itself
        await send(invoice("c1", "5"))  # and the worker never noticed the console

        async def last_is_done() -> bool:
            return ("c1", 500) in await settled()

        await until("the worker to go on", last_is_done, 120)
        command.process.send_signal(signal.SIGINT)
        assert await command.wait() == 0
        assert "Traceback" not in command.errors and not re.search("1,50|customer-7", command.errors)
