"""The command of the campaign: `make live`, or `python -m verdicts_live`.

For the latter, tests/ must be on the path.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time

from verdicts_live.campaign import campaign, servers
from verdicts_live.verdicts import Tally

_EPILOG = """Exit code 0: no verdict was wrong. 1: some were, and each is printed with its seed. 130: interrupted; what was counted is printed."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make live",
        description="Checks and rebuilds beside running producers and workers, with kills, rebalances and operators: no verdict may be wrong.",
        epilog=_EPILOG,
    )
    parser.add_argument("--checks", type=int, default=25, metavar="N", help="how many checks (default: 25)")
    parser.add_argument("--rebuilds", type=int, default=5, metavar="N", help="how many rebuilds (default: 5)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the first life; the next ones count up (default: by the clock)")  # fmt: skip
    parser.add_argument("--fault", action="store_true", help="plant a fault in each life, which later verdicts must notice")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args()
    if given.checks < 1 or given.rebuilds < 0:
        parser.error("--checks at least 1, --rebuilds at least 0")
    for name in ("aiokafka", "asyncio", "consumer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a killed worker is one of their errors
    seed = int(time.time()) % 1_000_000 if given.seed is None else given.seed
    tally = Tally()
    code = 0
    for stop_signal in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in what a script starts in the background
        signal.signal(stop_signal, signal.default_int_handler)
    try:
        asyncio.run(_run(given, seed, tally))
    except KeyboardInterrupt:  # workers and servers were ended on the way here
        code = 130
    print(json.dumps(tally.as_dict()) if given.json else tally.table(), flush=True)
    return code or int(bool(tally.wrong))


async def _run(given: argparse.Namespace, seed: int, tally: Tally) -> None:
    async with servers() as where:
        await campaign(where, seed, given.checks, given.rebuilds, tally, faults=given.fault, progress=_progress)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
