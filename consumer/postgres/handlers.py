"""Names of handlers and topics, and their numbers in the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from consumer.core.errors import Misconfigured
from consumer.postgres.protocol import Connection

# Only missing names are inserted: an upsert would use up a number of a small range at every start.
_ADD_HANDLERS = """
insert into consumer.handlers (app, name) select $1, n from unnest($2::text[]) n
where not exists (select from consumer.handlers h where h.app = $1 and h.name = n)
on conflict do nothing
"""
_ADD_TOPICS = """
insert into consumer.topics (name) select n from unnest($1::text[]) n
where not exists (select from consumer.topics t where t.name = n) on conflict do nothing
"""
_RENAMED = """
select r.old_name, r.new_name from consumer.handler_renames r where r.app = $1 and r.old_name = any($2::text[])
and not exists (select from consumer.handlers h where (h.app, h.name) = (r.app, r.old_name))
order by r.renamed_at desc limit 1
"""


async def register(
    connection: Connection, app: str, handlers: Iterable[str], topics: Iterable[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the numbers of handlers and topics, and number new ones.

    Raises Misconfigured for a name that was changed.
    """
    await _refuse_renamed(connection, app, sorted(handlers))
    await connection.execute(_ADD_HANDLERS, app, sorted(handlers))
    await connection.execute(_ADD_TOPICS, sorted(topics))
    return await numbers(connection, app), await topic_numbers(connection)


async def known(
    connection: Connection, app: str, handlers: Iterable[str], topics: Iterable[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return numbers as `register` does, without writing.

    A new name gets a negative number, which no row has.
    """
    await _refuse_renamed(connection, app, sorted(handlers))
    by_handler, by_topic = await numbers(connection, app), await topic_numbers(connection)
    return (
        {name: by_handler.get(name, -number) for number, name in enumerate(handlers, 1)},
        {name: by_topic.get(name, -number) for number, name in enumerate(topics, 1)},
    )


async def numbers(connection: Connection, app: str) -> dict[str, int]:
    """Return the numbers of an application's handlers."""
    return dict(await connection.fetch("select name, handler from consumer.handlers where app = $1", app))


async def lock_numbers(connection: Connection, app: str) -> dict[str, int]:
    """Lock an application's handlers until the transaction ends, and return their numbers."""
    return dict(await connection.fetch("select name, handler from consumer.handlers where app = $1 for update", app))


async def rename(connection: Connection, app: str, number: int, old: str, new: str, operator: str) -> None:
    """Give a handler another name, and record who did."""
    await connection.execute("update consumer.handlers set name = $2 where handler = $1", number, new)
    await connection.execute(
        "insert into consumer.handler_renames (app, old_name, new_name, operator) values ($1, $2, $3, $4)",
        app,
        old,
        new,
        operator,
    )


async def remove(connection: Connection, number: int) -> None:
    """Delete a handler, which must have no rows elsewhere."""
    await connection.execute("delete from consumer.handlers where handler = $1", number)


async def apps(connection: Connection) -> list[str]:
    """Return the applications that have a handler or a position."""
    return [
        row[0]
        for row in await connection.fetch("select app from consumer.handlers union select app from consumer.positions")
    ]


async def names(connection: Connection, app: str | None) -> list[str]:
    """Return the names of an application's handlers; None: of all."""
    rows = await connection.fetch("select name from consumer.handlers where $1::text is null or app = $1", app)
    return [row[0] for row in rows]


async def topic_numbers(connection: Connection) -> dict[str, int]:
    """Return the numbers of all topics."""
    return dict(await connection.fetch("select name, topic from consumer.topics order by name"))


async def _refuse_renamed(connection: Connection, app: str, handlers: Sequence[str]) -> None:
    row = await connection.fetchrow(_RENAMED, app, handlers)
    if row is not None:
        raise Misconfigured(
            f"handler {row[0]!r} of App {app!r}: it was renamed to {row[1]!r} in the ledger; run the code with the new name, "
            f"or rename it back with `consumer migrate {app} --rename-handler {row[1]} {row[0]}`"
        )
