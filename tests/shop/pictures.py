"""`make pictures`: takes the pictures of docs/how-to/shop.md in Chromium."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

from shop_browser import Browser, Tab  # noqa: E402
from shop_process import Shop  # noqa: E402

TARGET = ROOT / "docs" / "img"


def begin(tab: Tab, **switches: bool) -> None:
    tab.js(
        "fetch('/orders', {method: 'POST', headers: {'content-type': 'application/json'}, body: '"
        + json.dumps(switches)
        + "'})"
    )
    tab.reload()
    tab.until("document.getElementById('verdict').textContent === 'Nothing was charged.'")


def tap(tab: Tab, taps: int, verdict: str) -> None:
    tab.click("#tap", times=taps)
    tab.until(f"document.querySelectorAll('#taps li').length >= {taps}")
    tab.until(f"document.getElementById('verdict').textContent.startsWith('{verdict}')")
    tab.until("![...document.querySelectorAll('#messages li')].some(each => each.textContent.includes('not settled'))")
    tab.js("document.activeElement.blur()")
    time.sleep(0.8)  # what is new shines for 0.6 s


def take(browser: Browser, url: str) -> None:
    with browser.visitor(width=900, height=600) as visitor:
        tab = visitor.tab(url)
        begin(tab, greying=False, token=False, ledger=False)
        tap(tab, 2, "Charged 2 times")
        tab.png(TARGET / "shop-charged-twice.png")
    with browser.visitor(width=900, height=600) as visitor:
        tab = visitor.tab(url)
        begin(tab, greying=False, token=False, ledger=True)
        tap(tab, 2, "Charged once")
        tab.png(TARGET / "shop-charged-once.png")
    for name, scheme, width in (
        ("shop-light", "light", 900),
        ("shop-dark", "dark", 900),
        ("shop-phone", "light", 360),
    ):
        with browser.visitor(width=width, height=600) as visitor:
            tab = visitor.tab(url)
            tab.media(prefers_color_scheme=scheme)
            begin(tab, greying=False, token=True, ledger=True)
            tap(tab, 2, "Charged once")
            tab.png(TARGET / f"{name}.png")


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    shop = Shop()
    browser = Browser()
    try:
        take(browser, shop.url)
    finally:
        browser.close()
        shop.end()


if __name__ == "__main__":
    main()
