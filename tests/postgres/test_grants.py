"""The printed rights of a role are enough, and no more.

That they are enough is shown by the suite itself: its workers and commands connect as harness.WORKER, which has them.
"""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest
from harness import WORKER, Place, consumer, is_one_line, query, value

from consumer.postgres import grants


async def test_every_table_and_function_of_the_schema_is_named(place: Place) -> None:
    tables = await query(
        place.dsn,
        """select relname from pg_class where relnamespace = 'consumer'::regnamespace and relkind in ('r', 'p', 'v', 'm')
           and not exists (select from pg_inherits where inhrelid = pg_class.oid)""",
    )
    functions = await query(
        place.dsn,
        "select proname from pg_proc where pronamespace = 'consumer'::regnamespace and prorettype <> 'trigger'::regtype",
    )
    for purpose in grants.For:
        named = set(grants.TABLES[purpose])
        assert {row[0] for row in tables} <= named, f"give {purpose.value}s their rights on it, or () for none"
        assert named <= {row[0] for row in [*tables, *functions]}, f"{purpose.value}: rights on what is not there"
    printed = grants.as_sql("r", grants.For.WORKER)
    assert [row[0] for row in functions if row[0] not in printed] == []


async def test_a_worker_may_do_what_is_printed_and_nothing_else(place: Place) -> None:
    """PostgreSQL's catalog shows every right, also an inherited one."""
    given = await query(
        place.dsn,
        """select c.relname, lower(p) from pg_class c, unnest(array['select', 'insert', 'update', 'delete', 'truncate',
                  'references', 'trigger']) p
           where relnamespace = 'consumer'::regnamespace and relkind in ('r', 'p', 'v', 'm')
             and case when p in ('delete', 'truncate', 'trigger') then has_table_privilege($1, c.oid, p)
                      else has_any_column_privilege($1, c.oid, p) end""",
        WORKER,
    )
    assert set(given) == set(zip(*grants.needed(), strict=True))
    assert {right for _, right in given} <= {"select", "insert", "update", "delete"}
    assert {right.split()[0] for rights in grants.TABLES[grants.For.READER].values() for right in rights} == {"select"}
    assert not await value(place.dsn, "select has_schema_privilege($1, 'consumer', 'create')", WORKER)
    refused = [
        "truncate consumer.ledger",
        "delete from consumer.dead_letters",
        "delete from consumer.positions",
        "update consumer.ledger set id = gen_random_uuid()",
        "update consumer.ledger set fingerprint = 0",
        "update consumer.installation set nonce = gen_random_uuid()",  # a new epoch is the owner's to begin
        "update consumer.handlers set name = 'other'",
        "insert into consumer.schema_versions values (99, 'x', 'x')",
        "drop table consumer.ledger",
        "alter table consumer.ledger disable trigger all",
        "create table consumer.mine (a int)",
        "create index on consumer.ledger (topic)",
    ]
    for sql in refused:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await query(place.worker_dsn, sql)


async def test_a_reader_sees_no_message_and_changes_nothing(place: Place, tmp_path: Path) -> None:
    role = 'Reads "only"'  # a name that needs its quotes
    printed = consumer(tmp_path, "migrate", "--grants", role, "--read-only")
    assert printed.returncode == 0
    connection = await asyncpg.connect(place.dsn)
    try:
        quoted = '"Reads ""only"""'
        await connection.execute(f"create role {quoted} login password 'reads'")
        await connection.execute(f"grant all on all tables in schema consumer to {quoted}")  # is taken back
        await connection.execute(printed.stdout)
        await connection.execute(printed.stdout)  # and may be run again
    finally:
        await connection.close()
    dsn = f"postgresql://Reads%20%22only%22:reads@{place.dsn.rsplit('@', 1)[1]}"
    try:
        assert await value(dsn, "select count(*) from consumer.ledger") == 0
        assert await query(dsn, "select reason, attempts from consumer.dead_letters") == []
        for sql in (
            "select value from consumer.dead_letters",
            "select key from consumer.dead_letters",
            "select header_values from consumer.dead_letters",
            "select error from consumer.dead_letters",
            "insert into consumer.topics (name) values ('x')",
            "delete from consumer.ledger",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await query(dsn, sql)
        code = "from consumer import App\napp = App('good')\n@app.handler('x')\nasync def settle(value: bytes) -> None: ...\n"
        (tmp_path / "good.py").write_text(code)
        assert consumer(tmp_path, "show", "good:app", "x", CONSUMER_POSTGRES_DSN=dsn).returncode == 1  # it may ask
    finally:
        connection = await asyncpg.connect(place.dsn)
        await connection.execute(f"drop owned by {quoted}; drop role {quoted}")
        await connection.close()


async def test_role_without_rights_gets_an_error_with_the_command_to_grant_them(place: Place, tmp_path: Path) -> None:
    connection = await asyncpg.connect(place.dsn)
    try:
        await connection.execute(f'revoke delete on consumer.ledger from "{WORKER}"')
    finally:
        await connection.close()
    (tmp_path / "nothing.py").write_text(
        "from consumer import App, Tx\napp = App('nothing')\n@app.handler('none')\nasync def f(v: dict, tx: Tx) -> None: ...\n"
    )
    result = consumer(tmp_path, "run", "nothing:app", CONSUMER_POSTGRES_DSN=place.worker_dsn)
    is_one_line(result, "may not write to ledger", "consumer migrate --grants ROLE")


def test_invalid_role_is_refused(tmp_path: Path) -> None:
    for name in ("", "PUBLIC", "a" * 64):
        is_one_line(consumer(tmp_path, "migrate", "--grants", name), "role" if name else "name")
    is_one_line(consumer(tmp_path, "migrate", "--grants", "w", "--sql"), "--grants")
    is_one_line(consumer(tmp_path, "migrate", "--read-only"), "--grants ROLE")
    hostile = consumer(tmp_path, "migrate", "--grants", 'x"; drop table consumer.ledger; --').stdout
    assert hostile.count('"x""; drop table consumer.ledger; --"') == hostile.count("drop table")


def test_migrate_says_how_to_get_them(database: str, tmp_path: Path) -> None:
    assert "--grants ROLE" in consumer(tmp_path, "migrate", CONSUMER_POSTGRES_DSN=database).stdout
