"""One worker without a supervisor, which may kill itself.

It runs chaos/application.py; `CHAOS_DIE=STEP:NTH` names the step of worker/worker.py.
"""

from __future__ import annotations

import asyncio
import os
import signal

from chaos.application import app
from consumer.logs import configure
from consumer.settings import load
from consumer.worker.worker import Worker


def main() -> None:
    step, _, nth = os.environ.get("CHAOS_DIE", "").partition(":")
    left = [int(nth or 0)]

    def passed(name: str) -> None:
        if name == step:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    settings = load()
    configure("debug", "json")
    worker = Worker(app, settings, on_step=passed)

    async def run() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()

    asyncio.run(run())


if __name__ == "__main__":
    main()
