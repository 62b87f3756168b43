"""Notices of `consumer status` and `consumer run` about an App.

Each notice has a kind, a sentence and the command that resolves it; a problem among them makes the result of `status`
negative.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from consumer.app import App
from consumer.handler_records import id_rules
from consumer.handler_records.coverage import HandlerCoverage, read_coverage
from consumer.handler_records.settled_ranges import Assessment, Gap
from consumer.kafka.group import Group

_PLACES_MAX = 5


class Notice(NamedTuple):
    """is_problem: somebody must act on it."""

    kind: str
    text: str
    do: str
    is_problem: bool

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"kind": self.kind, "text": self.text, "do": self.do, "problem": self.is_problem}


async def gather(
    connection: Any, app: App, path: str, group: Group, missing_topics: Collection[str]
) -> tuple[list[Notice], Assessment]:
    """Return all notices of an App, and what its handlers have missed."""
    recorded = await read_coverage(connection, app.name)
    assessment = recorded.assess(app)
    rules = await id_rules.read_id_rules(connection, app)
    notices = [
        *_of_id_rules(rules, path),
        *_of_handlers(assessment, app.name, path),
        *_of_topics(recorded, path, missing_topics),
    ]
    if group.foreign_members:
        notices.append(
            Notice(
                "stranger",
                f"the group {app.name!r} has members that are no workers of this App ({', '.join(group.foreign_members)}): the "
                "messages of their partitions are not applied",
                "give them another group id",
                True,
            )
        )
    return notices, assessment


async def at_start(connection: Any, app: App, path: str) -> list[Notice]:
    """Return the notices to show before workers start."""
    rules = await id_rules.read_id_rules(connection, app)
    return [
        *_of_id_rules(rules, path),
        *_of_handlers((await read_coverage(connection, app.name)).assess(app), app.name, path),
    ]


def gap_text(gaps: Collection[Gap]) -> str:
    """Return the number of missed offsets and their ranges as text."""
    places = [f"{gap.partition.topic}:{gap.partition.partition} {gap.first} to {gap.past - 1}" for gap in gaps]
    more = f" and {len(places) - _PLACES_MAX} more" if len(places) > _PLACES_MAX else ""
    return f"{sum(gap.past - gap.first for gap in gaps):,} offsets ({', '.join(places[:_PLACES_MAX])}{more})"


def filling(path: str, topics: Iterable[str], handler: str, renamed_from: Collection[str], app: str) -> str:
    """Return the commands that end a handler's gap.

    Those that would apply messages twice are not offered first.
    """
    new = (
        f"consumer replay {path} {' '.join(topics)} --apply --handler {handler} fills it, "
        f"consumer positions {path} --handler {handler} --begin-here leaves it"
    )
    if not renamed_from:
        return new
    renames = " or ".join(f"consumer migrate {app} --rename-handler {old} {handler}" for old in sorted(renamed_from))
    return f"if it was renamed: {renames}, since --apply would apply its messages again; only if it is new: {new}"


def _of_id_rules(rules: id_rules.IdRules, path: str) -> Iterable[Notice]:
    for name, change in sorted(rules.changes.items()):
        yield Notice("id_rule_changed", change.text, id_rules.accepting(path, name), True)


def _of_handlers(assessment: Assessment, app: str, path: str) -> Iterable[Notice]:
    for rename in assessment.renames:
        yield Notice(
            "probable_rename",
            f"handler {rename.new!r} has not settled what {rename.old!r}, of the same topic {rename.topic}, has, which is no longer in "
            "the App: if it was renamed, its messages would be applied again",
            f"consumer migrate {app} --rename-handler {rename.old} {rename.new}",
            True,
        )
    for name in sorted({gap.handler for gap in assessment.gaps}):
        gaps = [gap for gap in assessment.gaps if gap.handler == name]
        topics = sorted({gap.partition.topic for gap in gaps})
        old = {rename.old for rename in assessment.renames if rename.new == name}
        yield Notice(
            "gap",
            f"handler {name!r} has not settled {gap_text(gaps)}, which the application is past",
            filling(path, topics, name, old, app),
            True,
        )
    for name in assessment.absent:
        yield Notice(
            "absent_handler",
            f"handler {name!r} settles messages of this App in the ledger, and this code lacks it: another version of the App, "
            "another service under the same App name, or a handler that was removed",
            "deploy one version everywhere; give another service another App name; a handler that was removed needs nothing",
            False,
        )


def _of_topics(recorded: HandlerCoverage, path: str, missing_topics: Collection[str]) -> Iterable[Notice]:
    for topic in sorted({partition.topic for partition in recorded.positions} & set(missing_topics)):
        yield Notice(
            "deleted_topic",
            f"topic {topic} was deleted: the ledger holds positions of it, and nothing of it is applied",
            f"recreate it and run consumer positions {path} --topic {topic} --adopt, or let no handler take it",
            True,
        )
    for partition, offset in sorted(recorded.began_with_group.items()):
        yield Notice(
            "began_with_group",
            f"{partition.topic}:{partition.partition} began at {offset}, which another client of the group had committed: "
            "what is before it was not applied",
            f"consumer positions {path} --topic {partition.topic} --partition {partition.partition} --move-to earliest",
            False,
        )
