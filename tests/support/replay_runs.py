"""Runs replays without the command line, and counts their outcomes."""

from __future__ import annotations

import uuid
from typing import Any

from harness import Place

from consumer import App
from consumer.core.identity import message_id
from consumer.replay.findings import Findings
from consumer.replay.options import Limits, Options, Progress
from consumer.replay.rebuild_run import RebuildOptions, run_rebuild
from consumer.replay.republish_run import RepublishOptions, run_republish
from consumer.replay.verify import replay


async def run_replay(place: Place, app: App, *topics: str, **options: Any) -> Findings:
    """Run a replay, rebuild or republishing with the options of its mode.

    settings, limits: changes to the settings and limits of the run.
    """
    settings = place.settings(**options.pop("settings", {}))
    limits = Limits(**options.pop("limits", {}))
    match options.get("mode", "check"):
        case "rebuild":
            return await run_rebuild(app, settings, topics, RebuildOptions(**_without_mode(options)), Progress())
        case "republish":
            return await run_republish(app, settings, topics, RepublishOptions(**_without_mode(options)), Progress())
    return await replay(app, settings, topics, Options(**options), Progress(), limits=limits)


def _without_mode(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "mode"}


def outcome_counts(findings: Findings, handler: str = "settle") -> dict[str, int]:
    """How many messages of a handler had which outcome, without zeros."""
    return {name: count for name, count in findings.as_dict()["handlers"][handler].items() if count}


def ledger_id(text: str) -> uuid.UUID:
    """The key under which the ledger keeps a message id."""
    return uuid.UUID(bytes=message_id(text.encode()))
