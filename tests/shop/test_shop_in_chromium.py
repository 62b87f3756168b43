"""The payment page in real Chromium: an order is charged once.

Whatever a person does to it, with the ledger. PostgreSQL says how often it was charged; then the page must say the
same.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from harness import until
from shop_browser import Browser, Tab, Visitor
from shop_process import PRICE, Shop, is_settled, soon

ON_OFF = (True, False)
LAYERS = list(itertools.product(ON_OFF, ON_OFF))
START = 1000_00


def set_switches(tab: Tab, *, greying: bool = True, token: bool = True, ledger: bool = True) -> str:
    """Set the page's own switches, and return the new order."""
    before = tab.js("document.body.dataset.order")
    wanted = json.dumps({"greying": greying, "token": token, "ledger": ledger})
    tab.js(
        "(() => {const f = document.getElementById('layers');"
        f"for (const [name, on] of Object.entries({wanted})) f.elements[name].checked = on; f.requestSubmit()}})()"
    )
    order = tab.until(
        f"document.readyState === 'complete' && document.body.dataset.order !== {json.dumps(before)}"
        " && document.body.dataset.order"
    )
    for name, on in (("greying", greying), ("token", token), ("ledger", ledger)):
        assert tab.js(f"document.querySelector('[name={name}][type=checkbox]').checked") is on
    return str(order)


def view(tab: Tab, order: str) -> dict[str, Any]:
    """The order as the server tells it to this visitor."""
    return dict(tab.js(f"fetch('/orders/{order}').then(found => found.json())"))


def settled(tab: Tab, order: str, taps: int) -> dict[str, Any]:
    """Wait for so many answered taps and no message on its way."""

    def there() -> dict[str, Any] | None:
        shown = view(tab, order)
        return shown if len(shown["taps"]) >= taps and is_settled(shown) else None

    return dict(soon(there, f"{taps} taps of the order to be settled"))


async def is_charged(
    shop: Shop, tab: Tab, order: str, times: int, taps: int, *, ledger: bool, earlier: int = 0
) -> dict[str, Any]:
    """Check that PostgreSQL and the page agree on so many charges.

    Everything is settled, and the balance is right. earlier: charges of this visitor's orders before.
    """
    shown = settled(tab, order, taps)
    assert await shop.charges(order) == times, shown
    balance = START - (earlier + times) * PRICE
    assert await shop.balance(order, ledger) == balance
    assert shown["charged"]["times"] == times
    sentence = "Charged once" if times == 1 else f"Charged {times} times"
    tab.until(f"document.getElementById('verdict').textContent.startsWith('{sentence}')")
    tab.until(f"document.getElementById('balance').textContent.endsWith('{balance / 100:,.2f}')")
    assert tab.complaints() == []
    return shown


@contextmanager
def opened(browser: Browser, shop: Shop, **size: int) -> Iterator[tuple[Visitor, Tab]]:
    with browser.visitor(**size) as visitor:
        tab = visitor.tab(shop.url)
        tab.until("document.getElementById('verdict').textContent === 'Nothing was charged.'")
        yield visitor, tab


# -- people -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("greying", "token", "ledger"), list(itertools.product(ON_OFF, ON_OFF, ON_OFF)))
async def test_double_click(shop: Shop, browser: Browser, greying: bool, token: bool, ledger: bool) -> None:
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, greying=greying, token=token, ledger=ledger)
        tab.click("#tap", times=2)
        taps = 1 if greying else 2
        times = 1 if greying or token or ledger else 2
        shown = await is_charged(shop, tab, order, times, taps, ledger=ledger)
        messages = shown["messages"]
        assert len(messages) == (1 if greying or token else 2)
        assert ("charged" in messages[0]["fate"]) and shown["order"]["state"] == "paid"
        if ledger and len(messages) == 2:  # the page says who stopped it, once the worker's log line has come

            def is_named() -> bool:
                fate = view(tab, order)["messages"][1]["fate"]
                return "stopped by the pre-check" in fate or "stopped by the ledger" in fate

            soon(is_named, "who stopped the second")
        if token and not greying:  # the second tap has the first one's answer, at once or after it had to wait
            replayed = "answered with the first tap's result"
            soon(lambda: replayed in [tap["text"] for tap in view(tab, order)["taps"]], "the first one's answer")
            assert {tap["status"] for tap in view(tab, order)["taps"]} <= {202, 409}
            assert await shop.charges(order) == 1


@pytest.mark.parametrize(("token", "ledger"), LAYERS)
async def test_twenty_taps_at_once(shop: Shop, browser: Browser, token: bool, ledger: bool) -> None:
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, token=token, ledger=ledger)
        tab.click("#twenty")
        times = 1 if token or ledger else 20
        shown = await is_charged(shop, tab, order, times, 20, ledger=ledger)
        assert len(shown["messages"]) == (1 if token else 20)
        tab.until("document.querySelectorAll('#messages li').length === " + str(len(shown["messages"])))
        if ledger and not token:
            assert sum("stopped by" in message["fate"] for message in shown["messages"]) == 19


@pytest.mark.parametrize(("token", "ledger"), LAYERS)
async def test_reload_sends_it_again(shop: Shop, browser: Browser, token: bool, ledger: bool) -> None:
    """Without JavaScript F5 posts the form again.

    The grey button stops nothing here.
    """
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, token=token, ledger=ledger)
        tab.call("Emulation.setScriptExecutionDisabled", value=True)
        tab.reload()
        tab.click("#tap", loads=True)
        tab.reload()
        tab.reload()
        assert "202" in tab.js("document.getElementById('notice').textContent")
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
        tab.goto(shop.url)
        times = 1 if token or ledger else 3
        shown = await is_charged(shop, tab, order, times, 3, ledger=ledger)
        assert len(shown["taps"]) == 3, "the reload did not send it again"


@pytest.mark.parametrize(("token", "ledger"), LAYERS)
async def test_two_tabs(shop: Shop, browser: Browser, token: bool, ledger: bool) -> None:
    with opened(browser, shop) as (visitor, tab):
        order = set_switches(tab, token=token, ledger=ledger)
        other = visitor.tab(shop.url)
        assert other.js("document.body.dataset.order") == order
        tab.click("#tap")
        other.click("#tap")
        times = 1 if token or ledger else 2
        await is_charged(shop, tab, order, times, 2, ledger=ledger)
        # What one tab did, the other shows without being loaded again.
        other.until("document.getElementById('verdict').textContent.startsWith('Charged')")


@pytest.mark.parametrize(("token", "ledger"), LAYERS)
async def test_back_and_again(shop: Shop, browser: Browser, token: bool, ledger: bool) -> None:
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, token=token, ledger=ledger)
        tab.click("#tap")
        settled(tab, order, 1)
        tab.goto(f"{shop.url}/icon.svg")
        tab.back()
        tab.until("document.getElementById('verdict').textContent === 'Charged once: 12.50.'")
        tab.click("#tap")
        await is_charged(shop, tab, order, 1 if token or ledger else 2, 2, ledger=ledger)


async def test_on_a_slow_network_and_without_one(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, greying=False, token=True, ledger=True)
        tab.network(latency_ms=300, bytes_per_second=20_000)
        tab.click("#tap", times=3)  # impatient
        await is_charged(shop, tab, order, 1, 3, ledger=True)
        tab.network()
        order = set_switches(tab, token=False)
        tab.network(offline=True)
        tab.click("#tap")
        tab.until("document.getElementById('notice').textContent.includes('whether it was accepted is not known')")
        tab.until("!document.getElementById('tap').hasAttribute('aria-disabled')")
        assert await shop.charges(order) == 0
        tab.network()
        tab.click("#tap")
        await is_charged(shop, tab, order, 1, 1, ledger=True, earlier=1)


# -- what is away -------------------------------------------------------------------------------------------------------


def does(tab: Tab, name: str, what: str) -> None:
    """Press a service's button, and wait until the page confirms it."""
    which = "[data-do=kill]" if what == "Kill" else ":not([data-do])"
    tab.until(f"document.querySelector('[data-service={name}] button{which}').textContent === '{what}'")
    tab.click(f"[data-service={name}] button{which}")
    if what != "Kill":
        text = "does not answer" if what == "Stop" else ""
        tab.until(
            f"(t => {json.dumps(text)} ? t === {json.dumps(text)} : t !== 'does not answer')"
            f"(document.querySelector('[data-service={name}] .health').textContent)"
        )


async def test_redis_stopped(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, greying=False)
        try:
            does(tab, "redis", "Stop")
            tab.click("#tap", times=2)
            shown = await is_charged(shop, tab, order, 1, 2, ledger=True)
            assert [tap["status"] for tap in shown["taps"]] == [202, 202]
            assert "could not be checked" in shown["token"]["text"]
            # One that is made meanwhile has no token, and says so; two tabs of it share the ledger's id.
            order = set_switches(tab, greying=False)
            assert tab.js("document.body.dataset.token") == ""
            tab.until("document.getElementById('token').textContent.startsWith('Not issued: Redis did not answer')")
            tab.click("#tap", times=2)
            settled(tab, order, 2)
            assert await shop.charges(order) == 1
            # Where the token is all there is, nothing is accepted without it.
            order = set_switches(tab, greying=False, ledger=False)
            tab.click("#tap", times=2)
            tab.until("document.getElementById('notice').textContent.startsWith('Answer 503')")
            assert view(tab, order)["messages"] == [] and await shop.charges(order) == 0
        finally:
            does(tab, "redis", "Start")
        # It came back and knows nothing: a token from before is unknown, and charges nothing.
        order = set_switches(tab)
        tab.click("#tap")
        await until("the charge", lambda: shop.charges(order))


@pytest.mark.parametrize("ledger", ON_OFF)
async def test_worker_killed_between_tap_and_effect(shop: Shop, browser: Browser, ledger: bool) -> None:
    """SIGKILL while the worker has the message and cannot commit.

    The test locks the positions. In the sandbox the charge is stored by then, in a transaction of its own, and the
    message comes again, more than once if the next worker's wait for the lock ends first. With the ledger, charge and
    claim are in the transaction that is lost.
    """
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab, ledger=ledger)
        topic = "shop-payments" if ledger else "shop-sandbox"
        tab.click("#tap")
        settled(tab, order, 1)  # so that there are positions of its partition to lock
        order = set_switches(tab, ledger=ledger)
        connection = await asyncpg.connect(shop.dsn)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("lock table consumer.positions in exclusive mode")
            tab.click("#tap")

            async def in_hand() -> bool:
                waits = await shop.value("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")
                return bool(waits)

            await until(f"the worker to wait with the message of {topic} in hand", in_hand)
            assert await shop.charges(order) == (0 if ledger else 1)
            if ledger:
                tab.until("document.getElementById('verdict').textContent.startsWith('Accepted, not yet charged.')")
            pid = view(tab, order)["services"]["worker"]["pid"]
            os.kill(pid, signal.SIGKILL)
            soon(lambda: view(tab, order)["services"]["worker"]["pid"] not in (0, pid), "another worker")
            await transaction.rollback()
        finally:
            await connection.close()

        async def again() -> bool:
            return await shop.charges(order) >= (1 if ledger else 2)

        await until("the next worker to charge it", again)
        shown = settled(tab, order, 1)
        charges = await shop.charges(order)
        assert charges == shown["charged"]["times"]
        assert charges == 1 if ledger else charges >= 2
        if not ledger:
            assert "delivered again" in shown["messages"][0]["fate"]


async def test_page_says_the_truth_while_services_are_away(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        says = "document.getElementById('verdict').textContent.startsWith({!r})"
        order = set_switches(tab, greying=False)
        does(tab, "worker", "Stop")
        tab.click("#tap", times=2)
        tab.until(says.format("Accepted, not yet charged. The worker is away"))
        assert await shop.charges(order) == 0
        does(tab, "worker", "Start")
        await is_charged(shop, tab, order, 1, 2, ledger=True)

        order = set_switches(tab, token=False)
        does(tab, "kafka", "Stop")
        tab.click("#tap")
        tab.until(says.format("Accepted, not yet charged. Kafka is away: the message waits in PostgreSQL"))
        tab.until("document.getElementById('notice').textContent.startsWith('Answer 202: Accepted')")
        assert await shop.charges(order) == 0
        does(tab, "kafka", "Start")
        shown = settled(tab, order, 1)
        assert len(shown["messages"]) == 1 and await shop.charges(order) == 1

        order = set_switches(tab, greying=False, token=False)
        does(tab, "postgresql", "Stop")
        tab.click("#tap", times=2)
        tab.until(says.format("PostgreSQL does not answer"))
        tab.until("document.getElementById('notice').textContent.includes('503: PostgreSQL does not confirm')")
        assert "unknown now" in tab.js("document.getElementById('balance').textContent")
        does(tab, "postgresql", "Start")
        tab.until("!document.getElementById('balance').textContent.includes('unknown now')")
        assert await shop.charges(order) == 0
        tab.click("#tap", times=2)
        tab.until(says.format("Charged once"))
        assert await shop.charges(order) == 1


# -- who reads it -------------------------------------------------------------------------------------------------------

# Every text with the colour that it has and the ground that it stands on.
_CONTRASTS = """
(() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const found = parse(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility() || node.closest('noscript, script, .skip')) continue;
    const [one, other] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), node.tagName, walk.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""


async def test_on_a_phone_in_light_and_dark(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop, width=360, height=740) as (_, tab):
        for token, ledger in ((False, False), (False, True)):
            order = set_switches(tab, token=token, ledger=ledger, greying=False)
            tab.click("#twenty")
            settled(tab, order, 20)
            tab.until("document.querySelectorAll('#messages li').length === 20")
            grounds = set()
            for scheme in ("light", "dark"):
                tab.media(prefers_color_scheme=scheme)
                for grey in ("setAttribute('aria-disabled', 'true')", "removeAttribute('aria-disabled')"):
                    tab.js(f"document.getElementById('tap').{grey}")
                    worst = tab.js(_CONTRASTS)
                    assert len(worst) > 60 and worst[0][0] >= 4.5, (scheme, worst[:3])
                grounds.add(tab.js("getComputedStyle(document.body).backgroundColor"))
                assert tab.js("document.documentElement.scrollWidth") <= 360
                beyond = tab.js(
                    "[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.matches('.skip')"
                    " && e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 80))"
                )
                assert beyond == []
            assert len(grounds) == 2
        # Big enough for a thumb: WCAG 2.2, 2.5.8, asks for 24 pixels.
        small = tab.js(
            "[...document.querySelectorAll('button, input')].filter(e => e.type !== 'hidden' && e.checkVisibility())"
            ".map(e => e.getBoundingClientRect().height).filter(height => height < 22)"
        )
        assert small == []
        for preference, moves in (("no-preference", "appear"), ("reduce", "none")):
            tab.media(prefers_reduced_motion=preference)
            assert tab.js("getComputedStyle(document.querySelector('.new')).animationName") == moves


async def test_by_keyboard_alone(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        here = "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"

        def tab_to(name: str) -> None:
            for _ in range(30):
                if tab.js(here) == name:
                    outline = tab.js("getComputedStyle(document.activeElement).outlineStyle")
                    assert outline != "none", f"{name} does not show that it has the focus"
                    return
                tab.key("Tab")
            pytest.fail(f"{name} is not reached by Tab")

        tab_to("ledger")
        tab.key("Space", loads=True)  # off
        tab.until("document.getElementById('balance').textContent.startsWith('Your sandbox account')")
        order = str(tab.js("document.body.dataset.order"))
        tab_to("amount")
        tab.key("Enter")
        settled(tab, order, 1)
        assert await shop.charges(order) == 1
        tab_to("tap")
        assert tab.js("document.activeElement.getAttribute('aria-disabled')") == "true"
        tab.key("Enter")  # it is grey, and keeps the focus
        assert tab.js(here) == "tap"
        tab_to("twenty")
        tab.key("Enter")
        shown = settled(tab, order, 21)
        assert await shop.charges(order) == 1 and len(shown["messages"]) == 1


async def test_changes_are_announced_and_everything_has_a_name(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        assert tab.js(
            "['notice', 'verdict', 'balance', 'stale'].every(id => document.getElementById(id).ariaLive === 'polite')"
        )
        # The verdict is changed in place: what is replaced as a whole is not announced by all readers.
        tab.js("window.kept = document.getElementById('verdict')")
        tab.click("#tap")
        tab.until("kept.isConnected && kept.textContent === 'Charged once: 12.50.'")
        tab.call("Accessibility.enable")
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "checkbox", "textbox", "combobox", "list", "region")
        named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
        named_nodes = [(role, name) for role, name in named if role in roles]
        assert {role for role, _ in named_nodes} >= {"button", "checkbox", "list", "region"}
        assert [node for node in named_nodes if node[0] != "list" and not node[1]] == []
        assert len({name for role, name in named_nodes if role == "button"}) == sum(
            role == "button" for role, _ in named_nodes
        )
        assert tab.js("document.documentElement.lang") == "en"
        assert tab.js("document.querySelectorAll('h1').length") == 1


async def test_page_needs_nothing_from_elsewhere(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        names = tab.js("performance.getEntriesByType('resource').map(each => new URL(each.name).origin)")
        assert len(names) >= 2 and set(names) == {shop.url}
        # A script that somebody smuggled in does not run.
        tab.js(
            "(() => {const s = document.createElement('script'); s.textContent = 'ran = 1'; document.body.append(s)})()"
        )
        assert tab.js("typeof ran") == "undefined"
        assert tab.complaints() != []


async def test_shipping_needs_the_version_that_was_seen(shop: Shop, browser: Browser) -> None:
    with opened(browser, shop) as (_, tab):
        order = set_switches(tab)
        tab.click("#tap")
        settled(tab, order, 1)
        tab.until("!document.getElementById('ship').hidden")
        # Another one changes the row, and this page has not heard of it yet.
        stale = view(tab, order)["order"]["version"]
        await shop.value("update shop.orders set version = version + 1 where order_id = $1 returning 1", UUID(order))
        announced = tab.js(
            f"fetch('/orders/{order}/state', {{method: 'POST', headers: {{'content-type': 'application/json'}},"
            f" body: JSON.stringify({{state: 'shipped', version: {stale}}})}}).then(async r => [r.status, (await r.json()).code])"
        )
        assert announced == [409, "version_stale"]
        assert view(tab, order)["order"]["state"] == "paid"
        tab.until("document.getElementById('state').textContent === 'paid'")
        soon(lambda: tab.js(f"version === {stale + 1}"), "the page to know the new version")
        tab.click("#ship")
        tab.until("document.getElementById('state').textContent === 'shipped'")
