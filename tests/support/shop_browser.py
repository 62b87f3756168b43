"""Drives headless Chromium: clicks, keys, reloads, tabs, slow networks.

It speaks the Chrome DevTools Protocol over two pipes. Calls block.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

_ANSWER_SECONDS = 60
_UNTIL_SECONDS = 60


class Browser:
    """One Chromium; each `visitor` has its own profile and cookies."""

    def __init__(self) -> None:
        path = shutil.which("chromium")
        if path is None:
            pytest.fail("no chromium in PATH: run `make chromium`", pytrace=False)
        self._home = tempfile.mkdtemp(prefix="shop-chromium-")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (theirs_in, theirs_out)]

        def as_three_and_four() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [
                *(path, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
                *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
                *("--remote-debugging-pipe", f"--user-data-dir={self._home}", "about:blank"),
            ],
            env={**os.environ, "HOME": self._home},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=as_three_and_four,
        )
        for descriptor in (theirs_in, theirs_out, *high):
            os.close(descriptor)
        self._out, self._in = ours_out, ours_in
        self._number = 0
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer. Fails on an error."""
        self._number += 1
        number = self._number
        answers = self._answers[number] = Queue()
        asked: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            asked["sessionId"] = session
        os.write(self._out, json.dumps(asked).encode() + b"\0")
        try:
            answer = answers.get(timeout=_ANSWER_SECONDS)
        except Empty:
            raise AssertionError(f"chromium does not answer {method}") from None
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    @contextlib.contextmanager
    def visitor(self, width: int = 1100, height: int = 900) -> Iterator[Visitor]:
        """A profile without a past."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        try:
            yield Visitor(self, context, width, height)
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._home, ignore_errors=True)

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._in, 1 << 16):
            *whole, rest = (rest + data).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                else:
                    self.events.append(message)


class Visitor:
    """Opens tabs that share cookies."""

    def __init__(self, browser: Browser, context: str, width: int, height: int) -> None:
        self._browser = browser
        self._context = context
        self._size = width, height

    def tab(self, url: str) -> Tab:
        width, height = self._size
        created = self._browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)
        target = created["targetId"]
        session = self._browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self._browser, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        tab.goto(url)
        return tab


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def js(self, expression: str) -> Any:
        """Evaluate an expression, waiting for promises. Fails when it throws."""
        evaluated = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in evaluated, evaluated["exceptionDetails"]
        return evaluated["result"].get("value")

    def until(self, expression: str, seconds: float = _UNTIL_SECONDS) -> Any:
        """Wait until an expression is true; meanwhile it may throw."""
        deadline = time.monotonic() + seconds
        while True:
            value: Any = None
            with contextlib.suppress(AssertionError):
                value = self.js(expression)
            if value:
                return value
            assert time.monotonic() < deadline, (expression, self.text())
            time.sleep(0.03)

    def goto(self, url: str) -> None:
        self._load("Page.navigate", url=url)

    def reload(self) -> None:
        """Reload, as the key F5 does.

        A page that came by POST is posted again.
        """
        self._load("Page.reload")

    def back(self) -> None:
        history = self.call("Page.getNavigationHistory")
        entry = history["entries"][history["currentIndex"] - 1]
        self._load("Page.navigateToHistoryEntry", entryId=entry["id"])

    def _load(self, method: str, **parameters: Any) -> None:
        before = self._loads()
        self.call(method, **parameters)
        self.loaded(before)

    def loaded(self, before: int) -> None:
        """Wait for one more load than `before`."""
        deadline = time.monotonic() + _UNTIL_SECONDS
        while self._loads() <= before:
            assert time.monotonic() < deadline, "no page was loaded"
            time.sleep(0.02)

    def _loads(self) -> int:
        return sum(
            event["method"] == "Page.loadEventFired" and event.get("sessionId") == self._session
            for event in list(self._browser.events)
        )

    def click(self, selector: str, times: int = 1, loads: bool = False) -> None:
        """Click the middle of an element, as often as `times` says."""
        before = self._loads()
        x, y = self.js(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})()"
        )
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)
        if loads:
            self.loaded(before)

    def key(self, key: str, text: str = "", loads: bool = False) -> None:
        """A key of the keyboard: Tab, Enter, Space."""
        before = self._loads()
        codes = {"Tab": 9, "Enter": 13, "Space": 32}
        given = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"Enter": "\r", "Space": " "}.get(key, text)
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)
        if loads:
            self.loaded(before)

    def text(self) -> str:
        with contextlib.suppress(AssertionError):
            return str(self.js("document.body.innerText"))
        return "(no page)"

    def media(self, **features: str) -> None:
        """What the reader's system prefers: prefers_color_scheme="dark", prefers_reduced_motion="reduce"."""
        pairs = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=pairs)

    def network(self, *, offline: bool = False, latency_ms: float = 0, bytes_per_second: float = -1) -> None:
        self.call(
            "Network.emulateNetworkConditions",
            offline=offline,
            latency=latency_ms,
            downloadThroughput=bytes_per_second,
            uploadThroughput=bytes_per_second,
        )

    def png(self, path: Path, whole: bool = True) -> None:
        """A picture of the whole page."""
        screenshot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(screenshot["data"]))

    def complaints(self) -> list[str]:
        """Exceptions of scripts, and what the content security policy refused."""
        complaints = []
        for event in list(self._browser.events):
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                complaints.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["source"] == "security":
                complaints.append(event["params"]["entry"]["text"])
        return complaints
