"""A campaign: lives, one after the other.

Until so many checks and rebuilds have been answered.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from services import Kafka

from consumer.local_servers import Postgres, Valkey
from verdicts_live.life import Life, Servers
from verdicts_live.verdicts import Answer, Tally

_CHECKS_A_LIFE = 30

Progress = Callable[[str], None]


@asynccontextmanager
async def servers() -> AsyncIterator[Servers]:
    """Kafka, PostgreSQL and Valkey of the campaign's own."""
    with Kafka() as kafka, Postgres({"fsync": "off"}) as postgres, Valkey() as valkey:
        yield Servers(kafka.bootstrap_servers, postgres.dsn, valkey.url)


async def campaign(
    where: Servers, seed: int, checks: int, rebuilds: int, tally: Tally, *, faults: bool = False, progress: Progress = lambda _: None
) -> None:  # fmt: skip
    """Fill the tally.

    Beside the checks and rebuilds asked for, each life is checked and rebuilt at its end.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="consumer-live-") as directory:
        while tally.count("check") < checks or tally.count("rebuild") < rebuilds:
            left = max(0, checks - tally.count("check")), max(0, rebuilds - tally.count("rebuild"))
            size = min(_CHECKS_A_LIFE, left[0])
            share = left[1] if size == left[0] else -(-left[1] * size // left[0])
            await _live(Life(where, seed, Path(directory), faults=faults), tally, size, share, progress)
            tally.seconds = time.monotonic() - begun
            progress(f"seed {seed}: {tally.count('check')}/{checks} checks, {tally.count('rebuild')}/{rebuilds} rebuilds, {len(tally.wrong)} wrong")  # fmt: skip
            seed += 1


async def _live(life: Life, tally: Tally, checks: int, rebuilds: int, progress: Progress) -> None:
    chance = random.Random(f"{life.seed}:order")
    steps = [True] * max(0, checks - 1) + [False] * max(0, rebuilds - 1)  # the last two come at rest
    chance.shuffle(steps)
    at = chance.randrange(1, max(2, len(steps) // 2)) if life._faults else -1
    try:
        async with life:
            await life.begin()
            for number, is_check in enumerate(steps):
                if number == at:
                    await life.plant()
                await asyncio.sleep(chance.uniform(0, 0.6))  # else most answers would come before the first disturbance
                answer, seen = await (life.check() if is_check else life.rebuild())
                _add(life, tally, answer, seen)
                progress(_line(answer))
            for answer, seen in await life.settle():
                _add(life, tally, answer, seen)
                progress(_line(answer))
    except Exception as error:
        raise RuntimeError(f"life with seed {life.seed}") from error
    finally:
        tally.disturbances.update(life.unrest.done)
        tally.rates.update(life.producing.rates)
        tally.kinds.update(life.producing.kinds)
        for failure in life.unrest.failed:
            progress(f"  a disturbance did not happen: {failure}")


def _line(answer: Answer) -> str:
    texts = "" if answer.code == 0 else "".join(f"\n      {text[:500]}" for text in answer.texts)
    return f"  {answer.what}: exit {answer.code} {'; '.join(answer.kinds)} ({answer.messages:,} messages, {answer.seconds:.1f} s){texts}"


def _add(life: Life, tally: Tally, answer: Answer, seen: bool | None) -> None:
    planted = life.planted
    tally.add(answer, seen, "" if planted is None else planted.kind, seed=life.seed, done=dict(life.unrest.done), fault="" if planted is None else planted.text)  # fmt: skip
