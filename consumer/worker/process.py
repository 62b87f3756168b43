"""Internal entry point of a worker process; use `consumer run`.

The supervisor starts it and holds two pipes: on standard input come the assignment (worker/interpreter.py) and orders
("begin", then "drain", or its end, when the supervisor has died), and reports go out as JSON lines on a descriptor of
their own. Settings are in the assignment, and secrets of files as their paths.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time

from consumer import logs
from consumer.app_loader import load_app
from consumer.core.errors import Misconfigured
from consumer.logs import describe, event
from consumer.settings import Settings, load
from consumer.transaction.dead_letter_rate import TooManyDeadLetters
from consumer.transaction.limits import HandlerUncancellable
from consumer.worker.event_loop import run
from consumer.worker.health import Stalled
from consumer.worker.interpreter import read_assignment
from consumer.worker.report_pipe import ReportPipe
from consumer.worker.restart_policy import EXIT_DEAD_LETTERS, EXIT_MISCONFIGURED, EXIT_OUTGROWN, EXIT_STALLED
from consumer.worker.worker import Worker

EXIT_FAILED = 1
_SECOND_SIGNAL_SECONDS = 0.5  # sooner, it is the same order from the terminal and the supervisor


def main() -> None:
    """Run a worker; the argument is the descriptor for its reports."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # child processes of the application must not hold the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the supervisor passes it on
    gc.enable()
    path = read_assignment()
    if path is None:
        os._exit(0)  # the command had an error, or was interrupted
    try:
        settings = load()
        logs.configure(settings.log_level, settings.log_format, config=settings.log_config)
        code = run(_work(path, settings, descriptor))
    except Misconfigured as error:
        logs.log.error(str(error))
        code = EXIT_MISCONFIGURED
    sys.stdout.flush()
    os._exit(code)  # not sys.exit: a thread or a task that a handler left behind must not keep the process


async def _work(path: str, settings: Settings, descriptor: int) -> int:
    worker = Worker(load_app(path), settings, report=ReportPipe(descriptor).send, path=path)
    loop = asyncio.get_running_loop()
    ordered_at = 0.0
    begun = asyncio.Event()

    def stop() -> None:
        nonlocal ordered_at
        begun.set()
        if ordered_at and time.monotonic() - ordered_at > _SECOND_SIGNAL_SECONDS:
            os._exit(128 + signal.SIGTERM)
        if not ordered_at:
            ordered_at = time.monotonic()
            worker.stop()
            loop.call_later(settings.grace_seconds + 5, os._exit, EXIT_FAILED)

    def order() -> None:
        orders = os.read(0, 100)
        begun.set()
        if orders == b"":
            loop.remove_reader(0)
        if orders != b"begin\n":
            stop()

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_reader(0, order)
    await begun.wait()  # modules are imported before this, while the supervisor checks the services
    try:
        await worker.run()
    except Misconfigured:
        raise
    except Stalled as error:
        event(logging.ERROR, str(error))
        return EXIT_STALLED
    except TooManyDeadLetters as error:
        event(logging.ERROR, str(error))
        return EXIT_DEAD_LETTERS
    except HandlerUncancellable as error:
        event(logging.ERROR, str(error))
        sys.stdout.flush()
        os._exit(EXIT_STALLED)  # not by return: the event loop would wait for the task that does not end
    except BaseException as error:  # no traceback: it would quote what the error quotes
        event(logging.ERROR, "worker failed", error=describe(error))
        return EXIT_FAILED
    return EXIT_OUTGROWN if worker.outgrown else 0


if __name__ == "__main__":
    main()
