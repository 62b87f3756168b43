"""`python -m consumer` is the `consumer` command."""

import os
import sys


def main() -> None:
    """Entry of the command. Ctrl-C while its modules are imported is one line too."""
    try:
        from consumer.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("consumer: interrupted\n")
        os._exit(130)
    command()


if __name__ == "__main__":
    main()
