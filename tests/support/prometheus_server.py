"""A real Prometheus that scrapes one address; `make prometheus` brings it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from harness import ROOT, until

from consumer.local_servers import free_port

_PLACES = os.pathsep.join([str(ROOT / ".cache" / "prometheus" / "usr" / "bin"), os.environ.get("PATH", os.defpath)])


def program(name: str) -> str | None:
    """The path of `prometheus` or `promtool`; None where it is missing."""
    return shutil.which(name, path=_PLACES)


class Prometheus:
    """A running server.

    Queries return the values of all series, or nothing while it does not answer.
    """

    def __init__(self, port: int) -> None:
        self._port = port

    async def query(self, expression: str) -> list[float]:
        def ask() -> list[float]:
            address = f"http://127.0.0.1:{self._port}/api/v1/query?{urlencode({'query': expression})}"
            try:
                with urlopen(address, timeout=20) as answer:
                    return [float(series["value"][1]) for series in json.load(answer)["data"]["result"]]
            except OSError:
                return []

        return await asyncio.to_thread(ask)


@asynccontextmanager
async def prometheus(port: int, directory: Path, rules: Path) -> AsyncIterator[Prometheus | None]:
    """Scrape a port every second in this block.

    Yields None where there is no Prometheus.
    """
    executable = program("prometheus")
    if executable is None:
        yield None
        return
    config = directory / "prometheus.yaml"
    scrape = f"{{job_name: consumer, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{rules}']\nscrape_configs: [{scrape}]\n"
    )
    own_port = free_port()
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}", "--log.level=error"]
    process = subprocess.Popen([executable, *arguments, f"--web.listen-address=127.0.0.1:{own_port}"])
    try:
        server = Prometheus(own_port)
        await until("Prometheus to scrape", lambda: server.query("up == 1"), 60)
        yield server
    finally:
        process.kill()
        process.wait()
