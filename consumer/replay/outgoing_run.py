"""Compares what the handlers publish with what is in the output topics.

`consumer replay --outgoing` runs it. The handlers run as in a rebuild (rebuild/rebuild.py): on copies of their tables, each
message that was applied once, in the order in which it was applied. What they publish and what the topics hold goes into
temporary tables as digests (outgoing_rows.py), so the memory does not grow with the topics.

A difference counts only if nothing else can explain it. If anything differs, the handlers run twice more: what differs from
run to run proves nothing. Limitations: a handler that reads what is outside its tables may publish something else now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.kafka.admin import topic_configs
from consumer.kafka.consumer import KafkaConsumer
from consumer.outbox.record import RECORD_BYTES_MAX
from consumer.postgres import outgoing_comparison as tables
from consumer.replay.dry_handlers import with_dry_handlers
from consumer.replay.findings import SAMPLES_MAX, Findings
from consumer.replay.options import Progress
from consumer.replay.outgoing_rows import OutgoingRows
from consumer.replay.outgoing_verdict import KINDS, outgoing_notes
from consumer.replay.rebuild_run import RebuildOptions, RebuildRun
from consumer.replay.selection import refuse_shards
from consumer.replay.wording import counted
from consumer.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingOptions:
    """How to compare.

    base: SQL for the first rows of the handlers' tables.
    """

    base: str | None = None
    allow_outside: bool = False


async def run_outgoing(
    app: App,
    settings: Settings,
    topics: Sequence[str],
    options: OutgoingOptions,
    progress: Progress,
    source: KafkaConsumer | None = None,
    *,
    alone: bool = False,
) -> Findings:
    """Run the handlers, and compare what they publish with Kafka.

    source: reads the logs; by default a consumer without a group. alone: the process does nothing else
    (dry_run_guard.py).

    Raises Misconfigured for an App that publishes nothing, CannotTell when it ended early. It changes nothing.
    """
    refuse_shards(app)
    if not app.publishes:
        raise Misconfigured(
            f"--outgoing: App {app.name!r} publishes nothing; declare App(publishes=[...]), or leave it out"
        )
    work = _OutgoingRun(app, settings, list(dict.fromkeys(topics)), options, progress, source)
    return await with_dry_handlers(app, work.run, allow_outside=options.allow_outside, alone=alone)


class _OutgoingRun(RebuildRun):
    """A rebuild that compares outgoing records instead of tables."""

    mode = "outgoing"

    def __init__(
        self,
        app: App,
        settings: Settings,
        topics: list[str],
        options: OutgoingOptions,
        progress: Progress,
        source: KafkaConsumer | None,
    ) -> None:
        rebuild_options = RebuildOptions(base=options.base, trace=False, allow_outside=options.allow_outside)
        super().__init__(app, settings, topics, rebuild_options, progress, source)
        self._outputs = list(app.publishes)
        self._explanations: list[dict[str, Any]] = []

    async def work(self) -> None:
        """Run the handlers, compare, and write what was found."""
        await self._check_outputs()
        async with OutgoingRows.open(self.settings, self.source, self._outputs, self.advance) as rows:
            result, compacted = await self.rebuilt(rows)
            if compacted:
                self._explain("", KINDS, f"the log of {', '.join(compacted)} is compacted: records are missing from it")
            self.findings.outgoing = await self._compared(rows, result.as_dict())
        self.findings.notes += [*result.notes, *outgoing_notes(self.findings.outgoing)]

    async def _check_outputs(self) -> None:
        """Learn how large records may be, as a worker does.

        Raises Misconfigured for a topic that does not exist.
        """
        configs = await topic_configs(self.settings, self._outputs)
        for topic in self._outputs:
            if topic not in configs:
                raise Misconfigured(
                    f"--outgoing: the output topic {topic!r} does not exist; check its name and the Kafka cluster"
                )
            config = configs[topic] or {}
            self.app.publishes[topic] = int(config.get("max.message.bytes") or RECORD_BYTES_MAX)
            if "compact" in (config.get("cleanup.policy") or ""):
                self._explain(topic, ("missing",), f"the log of {topic} is compacted")

    def _explain(self, topic: str, kinds: Sequence[str], text: str) -> None:
        """Note what may explain differences of these kinds. topic: "" for all."""
        self._explanations.append({"topic": topic, "kinds": list(kinds), "text": text})

    async def _compared(self, rows: OutgoingRows, rebuilt: Mapping[str, Any]) -> dict[str, Any]:
        connection = rows.connection
        if rows.is_compared:
            await rows.excuse()
            await self._explain_others(connection)
            self._explain_rebuild(rebuilt)
        counts = await tables.counts(connection) if rows.is_compared else []
        totals = await tables.totals(connection, self._outputs) if rows.is_compared else []
        return {
            "messages": rebuilt["messages"],
            "applied": rebuilt["applied"],
            "topics": [total._asdict() for total in totals],
            "differences": [
                {"topic": topic, "kind": kind, "reason": reason, "count": count}
                for topic, kind, reason, count in counts
            ],
            "samples": [
                {**sample._asdict(), "id": str(sample.id)} for sample in await tables.samples(connection, SAMPLES_MAX)
            ],
            "explanations": self._explanations,
            "unknown": [] if rows.is_compared else rebuilt["unknown"],
        }

    def _explain_rebuild(self, rebuilt: Mapping[str, Any]) -> None:
        """Note why the handlers may publish something else here than they did."""
        for table in rebuilt["tables"]:
            if table["missing"] or table["extra"] or table["different"]:
                text = f"the rebuilt table {table['table']} is not as the real one (--base FILE gives its first rows)"
                self._explain("", KINDS, text)
        for text in (*rebuilt["excuses"], *(doubt["text"] for doubt in rebuilt["unknown"])):
            self._explain("", KINDS, text)

    async def _explain_others(self, connection: Any) -> None:
        """Note who else publishes, and what no topic explains."""
        for topic, app, source in await tables.others(connection, self.app.name, self._outputs, self.topics):
            if app != self.app.name:
                self._explain(topic, ("extra",), f"App {app} publishes to it too")
            elif source:
                self._explain(topic, ("extra",), f"messages of {source} publish to it too: name that topic as well")
            else:
                self._explain(topic, ("extra",), "the App publishes to it outside its handlers too")
        if count := await tables.edited(connection, self.app.name):
            text = f"{counted(count, 'dead letter')} applied with an edited value, which no topic has"
            self._explain("", KINDS, text)
