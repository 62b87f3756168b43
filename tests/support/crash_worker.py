"""A worker that ends or freezes itself at a step.

`crash_worker.py TOPIC APP STEP NTH [stop]`. Settings come from the environment. The step `commit_sent` is between
sending a COMMIT and its answer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine

from payments_app import INSERT, UPDATE, Payment
from replacing import replace

from consumer import App, Tx
from consumer.logs import configure
from consumer.postgres.session import Session
from consumer.settings import load
from consumer.worker.worker import Worker


def app_of(topic: str, name: str) -> App:
    """Build an App with a handler that defers and one that awaits."""
    app = App(name)

    @app.handler(topic, name="settle")
    async def settle(payment: Payment, tx: Tx) -> None:
        tx.defer(INSERT, f"settle {payment.id}", payment.account, payment.amount)
        tx.defer(UPDATE, payment.account, payment.amount)

    @app.handler(topic, name="record")
    async def record(payment: Payment, tx: Tx) -> None:
        await tx.execute(INSERT, f"record {payment.id}", payment.account, 0)

    return app


class CrashAt:
    """Ends or stops the process the nth time a step is reached."""

    def __init__(self, step: str, nth: int, end: Callable[[], None]) -> None:
        self._step = step
        self._left = nth
        self._end = end

    def __call__(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left == 0:
                self._end()


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def after_sending(step: CrashAt) -> Callable[[Session], Coroutine[None, None, None]]:
    """Build a Session.commit that reports the step between statement and answer."""
    commit = Session.commit

    async def commit_and_stop(self: Session) -> None:
        asyncio.get_running_loop().call_soon(step, "commit_sent")  # runs when the driver waits for the answer
        await commit(self)

    return commit_and_stop


def main() -> None:
    topic, name, wanted, nth = sys.argv[1:5]
    step = CrashAt(wanted, int(nth), stop_itself if "stop" in sys.argv[5:] else lambda: os._exit(137))
    replace(Session, "commit", after_sending(step))
    settings = load()
    configure("debug", "json")
    asyncio.run(Worker(app_of(topic, name), settings, on_step=step).run())


if __name__ == "__main__":
    main()
