"""Judges the verdicts on one case.

Settles it, plants the fault, runs check and rebuild, and compares with the truth.
"""

from __future__ import annotations

import re
import time
import traceback
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import asyncpg

from consumer.core.errors import CannotTell, Misconfigured
from consumer.replay.findings import Findings
from consumer.replay.options import Options, Progress
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.verify import replay
from verdicts.case import Case
from verdicts.drawing import EFFECTS
from verdicts.faults import plant
from verdicts.handlers import Life, app_of
from verdicts.orders import Calls, possible_orders
from verdicts.servers import Servers
from verdicts.settling import APP, Settled, Unsettled, settle
from verdicts.truth import Rows, replayed, rows_of

_ORDERS_MAX = 300  # of overlapping transactions, that are tried
_NAMES = re.compile(r"\b(?:public\.)?[a-z]+\d+\b(\.\w+)?|\bh\d\d\b|\d[\d,.]*|verdicts-\S+")


@dataclass
class Answer:
    """What one mode said. reasons: why not 0, without names and numbers."""

    mode: str
    code: int
    reasons: list[str] = field(default_factory=list)
    text: str = ""
    wrong: bool = False


@dataclass
class Judged:
    """A case with its answers.

    fault: what was planted, in words, empty for none. undecided: why it could not be judged.
    """

    case: Case
    fault: str = ""
    visible: bool = False  # in the rows, as far as a rebuild promises to compare them
    undecided: str = ""
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_wrong(self) -> bool:
        """Whether any verdict is wrong."""
        return any(answer.wrong for answer in self.answers)

    def lines(self) -> list[str]:
        """A compact description."""
        planted = f"planted: {self.fault or 'nothing'}{', visible in the rows' if self.visible else ''}"
        said = [
            f"{answer.mode}: exit code {answer.code}{' is WRONG' if answer.wrong else ''}; {answer.text}"
            for answer in self.answers
        ]
        return [f"seed {self.case.seed}", *self.case.lines(), planted, *said]


async def judge(servers: Servers, case: Case) -> Judged:
    """Judge a case."""
    began = time.monotonic()
    judged = Judged(case)
    topics = await servers.topics(case.partitions)
    try:
        async with servers.database() as dsn:
            connection = await asyncpg.connect(dsn, statement_cache_size=0)
            try:
                await _judge(servers, case, judged, dsn, topics, connection)
            finally:
                await connection.close()
    except Unsettled as error:
        judged.undecided = str(error)
    finally:
        await servers.drop(topics)
    judged.seconds = time.monotonic() - began
    return judged


async def _judge(
    servers: Servers, case: Case, judged: Judged, dsn: str, topics: list[str], connection: asyncpg.Connection
) -> None:
    done = await settle(servers, case, dsn, topics, connection)
    await _plant(servers, done, judged, connection)
    for mode in ("check", "rebuild"):
        answer = await ask(servers, done, mode)
        answer.wrong |= answer.code in wrong_codes(case.fault.kind if judged.fault else "none", judged.visible, mode)
        judged.answers.append(answer)


async def _plant(servers: Servers, done: Settled, judged: Judged, connection: asyncpg.Connection) -> None:
    """Plant the fault; return whether it is visible in the rows.

    The fault of an effect is planted already.
    """
    case, life = done.case, done.life
    actual = await rows_of(connection)
    settled = Life(case, case.fault, healed=True) if case.fault.kind in EFFECTS else Life(case, healed=True)
    order = await _order(connection, done, settled, actual)
    if order is None:
        judged.undecided = "plain asyncpg leaves other rows than the worker"
    clean = await replayed(connection, case, Life(case, healed=True), order or done.applied)
    if case.fault.kind in EFFECTS:
        judged.visible = clean.rows != actual
        if judged.visible and not case.is_serial:
            judged.visible = (await replayed(connection, case, life, done.by_ledger)).rows != actual
        judged.fault = case.fault.kind if judged.visible else ""
    elif case.fault.kind != "none":
        judged.fault = await plant(servers, done, connection, case.fault, clean.writes)
        judged.visible = await rows_of(connection) != actual


async def _order(connection: asyncpg.Connection, done: Settled, life: Life, actual: Rows) -> Calls | None:
    """The order in which plain asyncpg leaves these rows, or None."""
    for order in islice(possible_orders(done), _ORDERS_MAX):
        if (await replayed(connection, done.case, life, order)).rows == actual:
            return order
    return None


def wrong_codes(kind: str, visible: bool, mode: str) -> set[int]:
    """The exit codes that are wrong.

    Each mode promises to see what it looks at: a check the ledger, a rebuild the rows.
    """
    if kind == "none":
        return {1}
    if kind == "log_head":
        return {1} if mode == "check" else {0, 1}
    if kind.startswith(("ledger", "letter")):
        return {0} if mode == "check" else set()
    if mode == "check":
        return {1}
    return {0} if visible else {1}


async def ask(servers: Servers, done: Settled, mode: Any) -> Answer:
    """Run a check or a rebuild in this process, like the command."""
    life = Life(done.case, healed=done.life.healed)
    app = app_of(life, APP, done.topics)
    # The case's file is for the state before the first message of all; with records gone, it would be a false statement.
    has_base = mode == "rebuild" and done.case.base and done.case.fault.kind != "log_head"
    base = done.case.seeds if has_base else None
    settings = servers.settings(done.dsn, batch_messages_max=done.case.batch)
    try:
        if mode == "rebuild":
            findings = await run_rebuild(app, settings, app.topics, RebuildOptions(base=base), Progress())
        else:
            findings = await replay(app, settings, app.topics, Options(mode=mode), Progress())
    except (Misconfigured, CannotTell) as error:
        return Answer(mode, 2, [_NAMES.sub("…", str(error))[:110]], str(error))
    except Exception as error:  # a traceback is no verdict
        return Answer(mode, 1, [type(error).__name__], "".join(traceback.format_exception(error)[-4:]), wrong=True)
    return Answer(mode, findings.verdict().exit_code, _reasons(findings), findings.answer())


def _reasons(findings: Findings) -> list[str]:
    reasons = []
    for finding in [*findings.problems(), *findings.unknowns()]:
        _, separator, why = finding["text"].partition("this may explain it: ")
        reasons.append(f"{finding['kind']}: {_NAMES.sub('…', why)[:70]}" if separator else finding["kind"])
    return list(dict.fromkeys(reasons))
