"""Check the filters of commands against the names that a database holds."""

from __future__ import annotations

from consumer.core.suggestions import UnknownName, check_known, suggestion
from consumer.postgres import dead_letter_queries
from consumer.postgres import handlers as handler_names
from consumer.postgres.protocol import Connection


async def check(
    connection: Connection,
    app: str | None = None,
    handler: str | None = None,
    topic: str | None = None,
    group: str | None = None,
    *,
    handlers: tuple[str, ...] = (),
    topics: tuple[str, ...] = (),
) -> None:
    """Raise UnknownName for a filter with a name that does not exist.

    handlers, topics: names that the App declares; they exist even if the database does not know them yet.
    """
    where = "this database" if app is None else f"App {app!r}"
    if handler is not None and handler not in handlers:
        known = await handler_names.names(connection, app)
        check_known("--handler", handler, [*known, *handlers], where)
    if topic is not None and topic not in topics:
        known = list(await handler_names.topic_numbers(connection))
        check_known("--topic", topic, [*known, *topics], "this database")
    if group is not None and not await dead_letter_queries.error_groups(connection, app, group):
        known = await dead_letter_queries.error_groups(connection, app, None)
        raise UnknownName(f"--group {group[:40]!r}: no dead letter of {where} is in it; {suggestion(group, known)}")
