"""Entry of the `consumer` command and of `python -m consumer`."""

import gc
import os
import sys

from consumer.cli import interrupts

_WITHOUT_WORKERS = {"--help", "-h", "--reload"}


def main() -> None:
    """Handle signals, then import and run the command.

    The imports take a while, so signals are handled first, and the first worker of `consumer run` imports meanwhile.
    """
    interrupts.end_at_once()
    _open_standard_files()
    gc.disable()  # while modules are imported: to look at them again and again takes a tenth of the time
    if sys.argv[1:2] == ["run"] and _WITHOUT_WORKERS.isdisjoint(sys.argv):
        from consumer.worker import interpreter

        interpreter.start_early()
    from consumer.cli.main import main as command

    command()


def _open_standard_files() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the parent process: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - open until the process ends
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


if __name__ == "__main__":
    main()
