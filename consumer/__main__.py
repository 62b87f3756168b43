"""Entry of the `consumer` command and of `python -m consumer`."""

from consumer.cli import interrupts


def main() -> None:
    """Answer signals in one line from here on, then import the command, which takes a while, and run it."""
    interrupts.end_at_once()
    from consumer.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
