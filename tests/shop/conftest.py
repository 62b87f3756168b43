"""One shop and one Chromium for all tests of the page.

Each test is a visitor of its own. At the end Ctrl-C must leave nothing.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from shop_process import Script, Shop, soon

from consumer.local_servers import Postgres


@pytest.fixture(scope="session")
def shop() -> Iterator[Shop]:
    # A directory that PostgreSQL's own user can reach, as those of pytest are not.
    with TemporaryDirectory(dir=Postgres().place()) as name:
        place = Path(name)
        place.chmod(0o755)
        started_shop = Shop(TMPDIR=name)
        try:
            yield started_shop
            ends_by_ctrl_c(started_shop, place)  # here, since another one takes 5 s to start
        finally:
            started_shop.end()


def ends_by_ctrl_c(shop: Shop, place: Path) -> None:
    """End the shop by Ctrl-C, also while a page listens.

    And with a broker that was stopped while a message waits for it.
    """
    script = Script(shop)
    assert left_behind(place) != []
    worker = script.view()["services"]["worker"]["pid"]
    host, port = shop.host.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as listening:
        head = f"GET /orders/{script.order}/events HTTP/1.1\r\nhost: {shop.host}\r\ncookie: {script.cookie}\r\n\r\n"
        listening.sendall(head.encode())
        assert b"text/event-stream" in listening.recv(4096)
        assert script.post("/services/kafka", '{"do": "stop"}').status == 200
        assert script.pay().status == 202
        shop.process.send_signal(signal.SIGINT)
        assert shop.process.wait(60) == 0
    soon(lambda: left_behind(place) == [], f"nothing to be left: {left_behind(place)}")
    soon(lambda: not Path(f"/proc/{worker}").exists(), "the worker to be gone")


def left_behind(directory: Path) -> list[str]:
    """Directories of its servers, and processes that work in them."""
    names = [path.name for path in directory.iterdir()]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_text("utf-8", "replace")  # any process of this machine, with any bytes
        except OSError:
            continue
        if str(directory) in command:
            names.append(command)
    return names
