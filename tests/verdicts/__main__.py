"""The command of the judge: `make verdicts`, or `python -m verdicts`.

For the latter, tests/ must be on the path. `--help` lists the options.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time

_EPILOG = """Exit code 0: no verdict was wrong; 1: one was, each printed with its seed; 130: interrupted, with the summary so far.
A case depends on its seed alone: --seed N --cases 1 repeats one. docs/explanation/verdicts.md tells how it works."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make verdicts", description="Random applications, settled by real code, with a planted fault or none: are the verdicts of replay and rebuild right?", epilog=_EPILOG)  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the first case; the next ones count up (default: by the clock)")
    parser.add_argument("--seconds", type=float, default=60, help="how long to judge (default: 60)")
    parser.add_argument("--cases", type=int, default=0, help="how many cases at most (default: no limit)")
    parser.add_argument("--stop-at", type=int, default=0, help="wrong cases to stop after (default: no limit)")
    parser.add_argument("--every", action="store_true", help="describe every case, not only those with a wrong verdict")
    parser.add_argument("--mutant", default="", help="break the verdicts in this way first: the judge must find it")
    parser.add_argument("--mutants", action="store_true", help="list the mutants")
    parser.add_argument("--json", action="store_true", help="the summary as one line of JSON")
    given = parser.parse_args()
    if not 1 <= given.seconds <= 86_400 or given.stop_at < 0 or given.cases < 0:
        parser.error("--seconds between 1 and 86400, --stop-at and --cases at least 0")
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    from services import Kafka

    from consumer.local_servers import Postgres
    from verdicts import mutants
    from verdicts.judging import Judged
    from verdicts.servers import Servers
    from verdicts.session import Summary, judge_all

    if given.mutants:
        print("\n".join(f"{name:24} {patch.__doc__}" for name, patch in mutants.MUTANTS.items()))
        return 0
    if given.mutant and given.mutant not in mutants.MUTANTS:
        print(f"make verdicts: --mutant {given.mutant}: there is none of this name; --mutants lists them", file=sys.stderr)  # fmt: skip
        return 2
    mutants.install(given.mutant)
    logging.getLogger("consumer").setLevel(logging.CRITICAL)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    summary = Summary(int(time.time()) % 1_000_000 * 1000 if given.seed is None else given.seed)

    def print_judged(judged: Judged) -> None:
        if not given.json and (given.every or judged.is_wrong):
            print("\n" + "\n".join(judged.lines()) + f"\n{judged.undecided} {judged.seconds:.1f} s", flush=True)
        elif not given.json and judged.undecided:
            print(f"seed {judged.case.seed} is undecided: {judged.undecided}", flush=True)

    async def run() -> None:
        with Kafka() as kafka, Postgres({"fsync": "off", "synchronous_commit": "off"}) as server:
            async with Servers(kafka.bootstrap_servers, server.dsn()) as servers:
                await judge_all(servers, summary, seconds=given.seconds, cases=given.cases, stop_at=given.stop_at, on_wrong=print_judged)  # fmt: skip

    if not given.json:
        print(f"seed {summary.seed} …", flush=True)
    code = 0
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        code = 130
    print(json.dumps(summary.as_dict()) if given.json else summary, flush=True)
    return code or int(bool(summary.wrong))


if __name__ == "__main__":
    sys.exit(main())
