"""The record of operators' actions.

It is complete, in the action's own transaction, and has the rows of earlier versions.
"""

from __future__ import annotations

import asyncpg
import pytest
from harness import WORKER, as_worker, migrated, query, value

from consumer.core.audit import ActedBy, Entry
from consumer.postgres import audit, dead_letter_queries, handlers, outbox
from consumer.postgres import migrate as schema

_LETTERS = """
insert into consumer.dead_letters (handler, id, fingerprint, topic, partition, "offset", "timestamp", value, header_keys, header_values,
                                   reason, error, attempts, state)
select 1, gen_random_uuid(), n, 'orders', n, n, 0, 'value', '{}', '{}', 'failed', 'error', 1, 'discarded'
from generate_series(1, 3) n returning dead_letter
"""
_EARLIER_ACTIONS = """
insert into consumer.letter_actions (dead_letter, operator, what, outcome, note, new_id, new_value) values
    (1, 'ann', 'retry', 'failed', 'quotes a payload', null, null),
    (1, 'ann', 'edit', 'applied', '', '00000000-0000-0000-0000-000000000007', 'mended'),
    (2, 'bob', 'discard', 'discarded', 'a test order', null, null);
insert into consumer.outbox_actions (stream, operator, what, from_seq, to_seq, why) values (1, 'eve', 'discard', 4, 6, 'too large')
"""


async def _at_version(database: str, monkeypatch: pytest.MonkeyPatch, version: int) -> asyncpg.Connection:
    known = schema.migrations()
    connection = await asyncpg.connect(database)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "migrations", lambda: known[:version])
        await schema.migrate(connection)
    return connection


async def _recorded(database: str) -> list[tuple[object, ...]]:
    return await query(
        database,
        """select a.app, a.operator, a.action, a.why, a.result, a.topic, a.partition, a.dead_letter, a.stream, a.numbers::text,
                  r.note, r.new_id::text, r.new_value
           from consumer.audit a left join consumer.letter_results r using (entry) order by entry""",
    )


async def test_actions_of_earlier_versions_move_and_their_commands_still_record(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await _at_version(database, monkeypatch, 4)
    try:
        await handlers.register(connection, "shop", ["bill"], ["orders"])
        await connection.fetch(_LETTERS)
        await connection.execute("insert into consumer.outbox_streams (app, source_topic, source_partition, topic) values ('shop', 'orders', 0, 'out')")  # fmt: skip
        await connection.execute(_EARLIER_ACTIONS)
        await schema.migrate(connection)
        expected = [
            ("shop", "ann", "dlq retry", "", "failed", "orders", 1, 1, None, "{}", "quotes a payload", None, None),
            ("shop", "ann", "dlq edit", "", "applied", "orders", 1, 1, None, "{}", "", "00000000-0000-0000-0000-000000000007", b"mended"),
            ("shop", "bob", "dlq discard", "a test order", "discarded", "orders", 2, 2, None, "{}", None, None, None),
            ("shop", "eve", "outbox discard", "too large", "resumed", "out", None, None, 1, '{"to_seq": 6, "from_seq": 4}', None, None, None),
        ]  # fmt: skip
        assert await _recorded(database) == expected
        assert await value(database, "select max(entry) from consumer.audit") == 4
        await connection.execute(_EARLIER_ACTIONS)  # by commands that do not know the new table yet
        assert await _recorded(database) == [*expected, *expected]
        left = "select (select count(*) from consumer.letter_actions) + (select count(*) from consumer.outbox_actions)"
        assert await value(database, left) == 0  # no payload stays behind
        listed = await dead_letter_queries.actions(connection, 1, 9)
        assert [(row["what"], row["note"]) for row in listed] == 2 * [("edit", ""), ("retry", "quotes a payload")]
    finally:
        await connection.close()


async def test_entries_are_listed_by_app_action_and_time(database: str) -> None:
    await migrated(database)
    connection = await asyncpg.connect(as_worker(database))
    try:
        by = ActedBy("ann\x00", "because")
        await audit.record(
            connection,
            Entry("positions move", by, "moved", "shop", "orders", 2, numbers={"before": None, "position": 7}),
            Entry("positions adopt", by, "adopted", "another"),
            Entry("purge", by, "done", None, numbers={"dropped": 1}),
        )
        [purge, move] = await audit.entries(connection, "shop", None, None, 9)
        assert (purge["action"], purge["app"]) == ("purge", None)
        assert tuple(move)[2:] == ("shop", "ann\\0", WORKER, "positions move", "because", "moved", "orders", 2, None, None,
                                   '{"before": null, "position": 7}')  # fmt: skip
        assert await audit.entries(connection, "shop", "positions", None, 9) == [move]
        assert await audit.entries(connection, "shop", "positions move", None, 9) == [move]
        assert await audit.entries(connection, "shop", "pos", None, 9) == []
        assert await audit.entries(connection, "shop", None, move["at"].timestamp() - 1, 1) == [purge]
        assert await audit.entries(connection, "shop", None, move["at"].timestamp() + 1, 9) == []
        for change in ("delete from consumer.audit", "update consumer.audit set operator = 'mallory'"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(change)
    finally:
        await connection.close()


async def test_action_that_cannot_be_recorded_is_not_done(database: str) -> None:
    await migrated(database)
    connection = await asyncpg.connect(as_worker(database))
    try:
        await connection.execute("with s as (insert into consumer.outbox_streams (app, source_topic, source_partition, topic) values ('shop', 'orders', 0, 'out') returning stream) insert into consumer.outbox_published (stream, stopped) select stream, 'too large' from s")  # fmt: skip
        await query(database, f'revoke insert on consumer.audit from "{WORKER}"')
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await outbox.resume(connection, "shop", 1, 0, ActedBy("ann", "why"))
        assert await value(database, "select stopped from consumer.outbox_published") == "too large"
    finally:
        await connection.close()
