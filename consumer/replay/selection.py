"""Chooses the handlers of a replay.

Refuses names and topics that do not fit. Imports the app and the core.
"""

from __future__ import annotations

from collections.abc import Sequence

from consumer.app import App
from consumer.core.errors import Misconfigured
from consumer.core.handler import Handler
from consumer.core.suggestions import UnknownName, suggestion


def refuse_shards(app: App) -> None:
    """Raise Misconfigured for an App with shards."""
    if app.shards:
        raise Misconfigured(
            f"App {app.name!r}: it has shards, and a replay reads one database only; to apply what is missing, move the positions "
            "back with `consumer positions APP --topic T --partition N --move-to earliest` (nothing is applied twice)"
        )


def handlers_of(app: App, topics: Sequence[str]) -> list[Handler]:
    """Return the handlers of any of these topics."""
    app.discover(topics)
    return [handler for handler in app.handlers.values() if set(topics) & set(handler.topics)]


def choose_handlers(app: App, topics: Sequence[str], names: Sequence[str] = ()) -> list[Handler]:
    """Return the idempotent handlers to replay; no names mean all.

    Raises Misconfigured for a name or a topic that does not fit.
    """
    refuse_no_topics(app, topics)
    for topic in topics:
        if not app.takes(topic):
            raise UnknownName(f"{app.name!r}: no handler of topic {topic!r}; {app.selection.suggestion(topic)}")
    for name in names:
        _check_name(app, topics, name)
    chosen = [
        handler for handler in handlers_of(app, topics) if handler.idempotent and (not names or handler.name in names)
    ]
    for topic in topics:
        if any(topic in handler.topics for handler in chosen):
            continue
        if names:
            raise Misconfigured(f"topic {topic!r}: no handler of {', '.join(names)} takes it; leave it out")
        raise Misconfigured(
            f"topic {topic!r}: all its handlers have idempotent=False and keep no ledger row, so there is nothing to verify; "
            "leave it out"
        )
    return chosen


def refuse_no_topics(app: App, topics: Sequence[str]) -> None:
    """Raise Misconfigured where no topic is named."""
    if not topics:
        raise Misconfigured(f"topics: none is named; name at least one topic of {app.selection}")


def _check_name(app: App, topics: Sequence[str], name: str) -> None:
    handler = app.handlers.get(name)
    if handler is None:
        raise UnknownName(f"{app.name!r}: no handler {name!r}; {suggestion(name, app.handlers)}")
    if not handler.idempotent:
        raise Misconfigured(
            f"handler {name!r}: it is not idempotent (idempotent=False) and keeps no ledger row to verify; leave it out"
        )
    if not set(topics) & set(handler.topics):
        raise Misconfigured(f"handler {name!r}: does not take {', '.join(topics)}; it takes {handler.selection}")
