"""Speed, as ratios in one run.

Workers compete with the loop that people write, the best loop by hand, and the limits. Real Kafka, PostgreSQL (fsync
on) and Valkey, started here. Contestants take turns, round after round; the result is the median, with the lowest and
the highest. After every drain the effects are compared with what was produced: a wrong one ends the run.

    make bench                                              the table of reference
    make bench ARGS="--scenario all --write"                all of them, into docs/reference/performance.md and its plot
    make bench ARGS="--scenario latency,killed"             some
    make bench ARGS="--scenario reference --only defer"     some contestants
    make bench ARGS="--scenario ledger --ledger-rows 50000000"
    make bench ARGS="--scenario memory --messages 10000000 --rounds 1"
    make bench ARGS="--scenario publishing-steady --seconds 3600"
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from bench import ROOT, Bench, servers
from contest import Options, ScenarioResult, machine, table
from plot import bars
from publishing import publishing, publishing_latency, publishing_steady
from scenarios import SCENARIOS, UNUSUAL

from consumer import logs
from consumer.worker.event_loop import run as run_loop

PAGE = ROOT / "docs" / "reference" / "performance.md"
PLOT = ROOT / "docs" / "reference" / "performance.svg"
SCENARIOS |= {
    "publishing": ("Consume, write, publish", publishing),
    "publishing-latency": ("From COMMIT to the acknowledgement", publishing_latency),
    "publishing-steady": ("Publish for long beside an old transaction", publishing_steady),
}


async def run(names: list[str], options: Options) -> dict[str, ScenarioResult]:
    results: dict[str, ScenarioResult] = {}
    with ExitStack() as stack:
        kafka, postgres, valkey = (stack.enter_context(server) for server in servers())
        bench = Bench(kafka, postgres, valkey)
        for name in names:
            begun = time.monotonic()
            results[name] = await SCENARIOS[name][1](bench, options)
            print(section(name, results[name]), flush=True)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return results


def section(name: str, result: ScenarioResult) -> str:
    return f"### {SCENARIOS[name][0]}\n\n{result.about}\n\n{table(result.rows)}\n"


def write(names: list[str], results: dict[str, ScenarioResult], options: Options) -> None:
    """Replace the page's measured parts, between their marks, and the plot."""
    text = PAGE.read_text("utf-8")
    for name in names:
        begin, end = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            print(f"{PAGE.name} has no {begin}: not written", file=sys.stderr)
            continue
        page = (
            f'{section(name, results[name])}\n`make bench ARGS="--scenario {name} --messages {options.messages} --rounds {options.rounds}"`, '
            f"{machine()}, all on one machine.\n"
        )
        text = f"{text.partition(begin)[0]}{begin}\n\n{page}\n{end}{text.partition(end)[2]}"
        if results[name].bars:
            base = next(iter(results[name].bars))
            PLOT.write_text(
                bars("Messages a second, and how many times the loop people write", results[name].bars, base), "utf-8"
            )
    PAGE.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenario", default="reference", help=f"all, or some of: {', '.join(SCENARIOS)} (default: reference)"
    )
    parser.add_argument("--messages", type=int, default=100_000, help="messages of a drain (default: 100,000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the result is their median (default: 3)")
    parser.add_argument("--only", help="of the reference: contestants whose name holds this (several: a,b)")
    parser.add_argument(
        "--ledger-rows", type=int, default=5_000_000, help="rows of the full ledger (default: 5 million)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="length of an open loop (default: 20)")
    parser.add_argument("--write", action="store_true", help=f"put the result into {PAGE.relative_to(Path(ROOT))}")
    given = parser.parse_args()
    names = (
        [scenario for scenario in SCENARIOS if scenario not in UNUSUAL]
        if given.scenario == "all"
        else given.scenario.split(",")
    )
    if unknown := [name for name in names if name not in SCENARIOS]:
        parser.error(f"no scenario {', '.join(unknown)}: there are {', '.join(SCENARIOS)}")
    if min(given.messages, given.rounds, given.ledger_rows, given.seconds) <= 0:
        parser.error("--messages, --rounds, --ledger-rows and --seconds are more than 0")
    options = Options(given.messages, given.rounds, given.only, given.ledger_rows, given.seconds)
    print(f"{machine()}, everything on this machine", file=sys.stderr)
    logs.configure("error", "json")
    results = run_loop(run(names, options))
    if given.write:
        write(names, results, options)


if __name__ == "__main__":
    main()
