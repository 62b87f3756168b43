"""One shop and one Chromium for all tests of the page; each test is a visitor of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shop_browser import Browser
from shop_process import Shop


@pytest.fixture(scope="session")
def shop() -> Iterator[Shop]:
    found = Shop()
    try:
        yield found
    finally:
        found.end()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = Browser()
    try:
        yield found
    finally:
        found.close()
