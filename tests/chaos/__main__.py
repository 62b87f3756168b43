"""The command of the harness: `make chaos`, or `python -m chaos`.

For the latter, tests/ must be on the path. `--help` lists the options.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from chaos.invariants import INVARIANTS
from chaos.rig import Rig
from chaos.run import Outcome, Run
from chaos.schedule import Ways, draw, ways

_EPILOG = """A run counts when each of its faults has happened, records were delivered again and COMMITs had unknown outcomes.
Exit code 0: all runs count and none has violated an invariant; 1 otherwise. What a bad run leaves (journal, schedule, logs,
dump of the tables) is kept in .cache/chaos/ and named. docs/explanation/chaos.md tells how it works."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description="Random faults, and what must be true after them.", epilog=_EPILOG)  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the first run; the next ones count up (default: by the clock)")
    parser.add_argument("--seconds", type=float, default=20, help="how long a run is tormented (default: 20)")
    parser.add_argument("--runs", type=int, default=1, help="how many, one after the other (default: 1)")
    parser.add_argument("--rate", type=float, default=100, help="messages a second, about (default: 100)")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="worker processes of the first of two `consumer run`; the others have one (default: 2)",
    )
    for name, what in (
        ("pooler", "PgBouncer in transaction mode in the path"),
        ("operators", "operators at work: retry, discard, mend, positions, replay --apply, purge"),
        ("versions", "two versions of the application in one group"),
        ("stages", "a second application, which consumes what the first one publishes"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{what} (default: by the seed)")
    parser.add_argument("--brief", action="store_true", help="one line for each run, and the tables of bad ones only")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each run")
    parser.add_argument("--schedule", action="store_true", help="print the schedule of the seed, and run nothing")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append a row for each run to the table at the end of FILE"
    )
    given = parser.parse_args()
    if not 1 <= given.seconds <= 86_400 or given.runs < 1 or given.workers < 1 or not 1 <= given.rate <= 5000:
        parser.error("--seconds between 1 and 86400, --rate between 1 and 5000, --runs and --workers at least 1")
    first = int(time.time()) % 1_000_000 if given.seed is None else given.seed
    if given.schedule:
        for fault in draw(first, given.seconds, _ways(given, first)):
            print(json.dumps(asdict(fault)))
        return 0
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # every fault is one of its errors
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended like by Ctrl-C: no worker is left behind
    try:
        return asyncio.run(_runs(given, first))
    except KeyboardInterrupt:  # the servers and workers have been ended on the way here
        return 130


async def _runs(given: argparse.Namespace, first: int) -> int:
    good = True
    async with Rig() as rig:
        for seed in range(first, first + given.runs):
            set_up = _ways(given, seed)
            if not given.json and not given.brief:
                print(f"seed {seed} ({set_up}): {given.seconds:g} s …", flush=True)
            outcome = await Run(rig, seed, given.seconds, rate=given.rate, workers=given.workers, ways=set_up).run()
            good &= outcome.good
            brief = given.brief and outcome.good
            print(
                json.dumps(asdict(outcome)) if given.json else line(outcome) if brief else described(outcome),
                flush=True,
            )
            if given.record is not None:
                with given.record.open("a") as table:
                    table.write(row(outcome))
    return 0 if good else 1


def _ways(given: argparse.Namespace, seed: int) -> Ways:
    """How a run is set up: by seed, unless arguments say otherwise."""
    asked = {name: getattr(given, name) for name in ("pooler", "operators", "versions", "stages")}
    return replace(ways(seed), **{name: value for name, value in asked.items() if value is not None})


def line(outcome: Outcome) -> str:
    """A run in one line."""
    counts = outcome.counts
    return (
        f"seed {outcome.seed}: {'good' if outcome.good else 'NOT GOOD'}, {outcome.ways}, {len(outcome.faults)} faults, "
        f"{counts.get('records', 0):,} records, {counts.get('redelivered', 0):,} delivered again, "
        f"{counts.get('unknown commits', 0)} COMMITs cut"
    )


def described(outcome: Outcome) -> str:
    """The tables of a run: faults, counts, invariants."""
    lines = [f"\nseed {outcome.seed} ({outcome.ways})\n", f"{'at':>6}  {'fault':28} what happened"]
    for fault in outcome.faults:
        lines.append(f"{fault.at:6.1f}  {fault.fault.kind:28} {fault.error or fault.seen}")
    lines += ["", *(f"{number:>8,}  {name}" for name, number in outcome.counts.items()), ""]
    for name, text in INVARIANTS.items():
        broken = outcome.violations.get(name)
        unknown = not outcome.counted and not broken
        is_absent = name == "I13" and "stages" not in outcome.ways
        verdict = "VIOLATED" if broken else "n/a" if is_absent else "?" if unknown else "holds"
        lines.append(f"{name:4} {verdict:8}  {text}")
        lines += [f"               {violation}" for violation in broken or ()]
    lines += ["", *(f"does not count: {reason}" for reason in outcome.vacuous)]
    lines.append(f"seed {outcome.seed}: {'good' if outcome.good else 'NOT GOOD'}")
    if outcome.directory:
        lines.append(f"kept: {outcome.directory}")
    if not outcome.good:
        lines.append(f"again: make chaos ARGS='--seed {outcome.seed} --seconds {outcome.seconds:g}'")
    return "\n".join(lines)


def row(outcome: Outcome) -> str:
    """A run as a row of docs/explanation/chaos.md's table."""
    kinds = sorted({fault.fault.kind for fault in outcome.faults})
    what = "no violation" if outcome.good else ", ".join(outcome.violations) or "does not count"
    counts = outcome.counts
    numbers = [counts.get(name, 0) for name in ("records", "duplicates", "redelivered", "unknown commits")]
    return f"| {outcome.seed} | {outcome.ways} | {len(outcome.faults)} | {len(kinds)} | {' | '.join(f'{number:,}' for number in numbers)} | {what} |\n"


if __name__ == "__main__":
    sys.exit(main())
