"""The command of the oracle: `make oracle`, or `python -m oracle`.

For the latter, tests/ must be on the path. `--help` lists the options.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from pathlib import Path

_EPILOG = """Exit code 0: the two sides agreed on every case; 1: they did not, and each counterexample was printed as a test;
130: interrupted, with the summary so far. A case depends on its seed alone: --seed N --cases 1 repeats one. docs/explanation/oracle.md
tells how it works."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make oracle", description="Random applications: a batch of the framework against plain asyncpg, one message at a time.", epilog=_EPILOG)  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the first case; the next ones count up (default: by the clock)")
    parser.add_argument("--seconds", type=float, default=60, help="how long to search, without shrinking (default: 60)")
    parser.add_argument("--cases", type=int, default=0, help="how many cases at most (default: no limit)")
    parser.add_argument("--stop-at", type=int, default=1, help="counterexamples to stop after (default: 1)")
    parser.add_argument("--shrink-seconds", type=float, default=60, help="time to make one small (default: 60)")
    parser.add_argument(
        "--code", type=Path, metavar="DIR", help="a checkout whose `consumer` package is judged instead of this one"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="give the framework one message at a time, too: what differs then is not the batch's",
    )
    parser.add_argument("--mutant", default="", help="break the framework in this way first: the oracle must find it")
    parser.add_argument("--mutants", action="store_true", help="list the mutants")
    parser.add_argument("--json", action="store_true", help="the summary as one line of JSON")
    given = parser.parse_args()
    if (
        not 1 <= given.seconds <= 86_400
        or given.stop_at < 1
        or given.cases < 0
        or not 0 <= given.shrink_seconds <= 3600
    ):
        parser.error(
            "--seconds between 1 and 86400, --stop-at at least 1, --cases at least 0, --shrink-seconds up to 3600"
        )
    if given.code is not None:
        if not (given.code / "consumer" / "__init__.py").is_file():
            parser.error("--code: no directory that holds the package `consumer`")
        sys.path.insert(0, str(given.code.resolve()))
    return _search(given)


def _search(given: argparse.Namespace) -> int:
    # Here, since --code decides which `consumer` these import.
    from consumer.local_servers import Postgres
    from oracle import mutants
    from oracle.databases import Databases
    from oracle.session import Counterexample, Summary, search

    if given.mutants:
        print("\n".join(f"{name:24} {patch.__doc__}" for name, patch in mutants.MUTANTS.items()))
        return 0
    if given.mutant and given.mutant not in mutants.MUTANTS:
        print(
            f"make oracle: --mutant {given.mutant}: there is none of this name; --mutants lists them", file=sys.stderr
        )
        return 2
    mutants.install(given.mutant)
    logging.getLogger("consumer").setLevel(logging.CRITICAL)
    seed = int(time.time()) % 1_000_000 * 1000 if given.seed is None else given.seed
    summary = Summary(seed)

    def print_example(example: Counterexample) -> None:
        if not given.json:
            print(f"\nseed {example.seed}, after {example.after_seconds} s:\n\n{example.test}\n", flush=True)

    async def run() -> None:
        with Postgres({"fsync": "off", "synchronous_commit": "off", "autovacuum": "off"}) as server:
            async with Databases(server.dsn()) as databases:
                await search(databases, summary, seconds=given.seconds, cases=given.cases, stop_at=given.stop_at, shrink_seconds=given.shrink_seconds, on_found=print_example, alone=given.alone)  # fmt: skip

    if not given.json:
        print(f"seed {seed} …", flush=True)
    code = 0
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        code = 130
    print(json.dumps(summary.as_dict()) if given.json else summary, flush=True)
    return code or int(bool(summary.counterexamples))


if __name__ == "__main__":
    sys.exit(main())
