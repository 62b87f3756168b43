"""The pages of what is going on: partitions and handlers.

They show what the watch knows, and ask no service.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from consumer.admin.status import Status
from consumer.console.context import Console, Page
from consumer.console.figures import OUTCOMES, History, outcomes_of, seconds_left
from consumer.core.dead_letters import normalized
from consumer.core.message import Partition
from consumer.outbox.streams import named
from consumer.replay.html.blocks import data_table
from consumer.replay.html.chart import chart
from consumer.replay.html.counts import count_cell, label, legend

_SPANS = {"10m": (10, 60), "1h": (60, 60)}  # width of a step in seconds, and how many


class Attention(NamedTuple):
    """Something that an operator should know.

    is_problem: somebody must act. link, query: a page within the console. command: what to run.
    """

    subject: str
    text: str
    is_problem: bool = True
    command: str = ""
    link: str = ""
    query: Mapping[str, str] = {}
    link_text: str = ""


async def partitions(console: Console, request: Request) -> Response:
    """Positions, lag, rate; what waits, what stopped and why."""
    page = Page(console, request)
    status = page.place.watch.known.status
    rows = [] if status is None else list(_rows(status, page.place.watch.history))
    return page.render(
        "partitions.html",
        rows=rows,
        attention=[] if status is None else list(attention_of(status)),
        waiting=[] if status is None else status.waiting,
        pauses=any(row["paused"] for row in rows),
    )


def _rows(status: Status, history: History) -> Iterator[Mapping[str, Any]]:
    systemic = {(row["topic"], row["partition"]): row["error"] for row in status.waiting if row["systemic"]}
    for row in status.partitions:
        place = (row["topic"], row["partition"])
        rate = history.rate(Partition(*place))
        is_standing = row["stopped"] or row["paused"]
        left = None if is_standing else seconds_left(row["lag"], rate)
        yield {**row, "rate": rate, "left": left, "systemic": systemic.get(place)}


def attention_of(status: Status) -> Iterator[Attention]:
    """Yield what needs an operator, the worst first."""
    for row in status.partitions:
        if stop := row["stopped"]:
            yield Attention(f"{row['topic']}:{row['partition']} has stopped", stop["why"], command=stop["do"])
    for row in status.waiting:
        if row["systemic"]:
            yield Attention(
                f"{row['handler']} fails for every message of {row['topic']}:{row['partition']}",
                f"{row['count']:,} wait; no attempt counts: {normalized(row['error'])}",
            )
    for stream in status.outbox["stopped"]:
        source = named(Partition(stream["source_topic"], stream["source_partition"]))
        yield Attention(
            f"stream {stream['stream']} from {source} to {stream['topic']} has stopped",
            stream["stopped"],
            link=f"/outbox/{stream['stream']}",
            link_text="Look at the stream",
        )
    for notice in status.notices:
        yield Attention(notice.kind.replace("_", " "), notice.text, notice.is_problem, command=notice.do)
    for topic in status.missing_topics:
        yield Attention(f"topic {topic}", "Kafka does not have it, or does not show it to this user", False)
    for name, counts in status.open_dead_letters.items():
        dead, behind = counts.get("dead", 0), counts.get("waiting", 0)
        yield Attention(
            f"{name} has dead letters",
            f"{dead:,} to decide on, {behind:,} waiting behind them",
            False,
            link="/dead-letters",
            query={"handler": name},
            link_text="Look at them",
        )


async def handlers(console: Console, request: Request) -> Response:
    """Outcomes of each handler by cause, in total and over time."""
    page = Page(console, request)
    over = page.given("over")
    over = over if over in _SPANS else "10m"
    known, history = page.place.watch.known, page.place.watch.history
    rows: list[dict[str, Any]] = []
    totals: dict[str, dict[str, int]] = {}
    if known.status is not None:
        totals = {name: outcomes_of(row) for name, row in known.status.handlers.items()}
    names = [name for name in OUTCOMES if any(name in counts for counts in totals.values())]
    for place, (name, counts) in enumerate(totals.items()):
        open_letters = known.status.open_dead_letters.get(name, {}) if known.status is not None else {}
        row = {
            "name": name,
            "anchor": f"handler-{place}",
            "counts": [counts.get(outcome, 0) for outcome in names],
            "dead": open_letters.get("dead", 0),
            "behind": open_letters.get("waiting", 0),
        }
        rows.append(row | _chart_of(history, name, known.at or 0.0, *_SPANS[over]))
    return page.render(
        "handlers.html", rows=rows, columns=[(label(name), "n") for name in names], over=over, since=history.since
    )


def _chart_of(history: History, handler: str, now: float, width: int, count: int) -> dict[str, Any]:
    """Return the chart of a handler, with its legend and numbers."""
    buckets = [
        {**bucket, "at": datetime.fromtimestamp(bucket["at"], UTC).isoformat()}
        for bucket in history.buckets(handler, now, width, count)
    ]
    names = [name for name in OUTCOMES if any(name in bucket for bucket in buckets)]
    totals = {name: sum(int(bucket.get(name, 0)) for bucket in buckets) for name in names}
    lines = [
        [str(bucket["at"])[11:19], *(count_cell(name, bucket.get(name, 0)) for name in names)] for bucket in buckets
    ]
    columns = [("from (UTC)", "name"), *((label(name), "n") for name in names)]
    return {
        "chart": chart(buckets, names, width) if names else None,
        "legend": legend(names, totals),
        "table": data_table(f"In steps of {width} seconds", columns, lines),
    }
