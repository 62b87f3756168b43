"""End on a signal while there is nothing to undo.

Imports nothing that takes time, because it comes first. A handler, not an exception: an import may swallow an exception,
or print a traceback of it.
"""

import os


def end_at_once() -> None:
    """Let SIGINT and SIGTERM end this process at once.

    A SIGINT that is ignored stays ignored.
    """
    try:
        import signal

        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _end)
        # The first process of a container ignores SIGTERM unless it has a handler.
        signal.signal(signal.SIGTERM, _end)
    except KeyboardInterrupt:
        _end(2, None)


def _end(number: int, _: object) -> None:
    try:
        os.write(2, b"consumer: interrupted\n" if number == 2 else b"consumer: terminated\n")
    finally:  # also if standard error is closed
        os._exit(128 + number)
