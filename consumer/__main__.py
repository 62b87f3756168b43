"""Entry of the `consumer` command and of `python -m consumer`."""

from consumer.cli import interrupts


def main() -> None:
    """Handle signals, then import and run the command.

    The import takes a while, so signals are handled first.
    """
    interrupts.end_at_once()
    from consumer.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
