"""The schema's migrations: numbered SQL files, applied once each, in one transaction, under one lock.

Knows files and their checksums; what they create is in migrations/. Migrations only add (a worker of the version before
goes on running beside a migrated schema).
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any, NamedTuple

from consumer.core.errors import Misconfigured

_LOCK = 0x1DE_117  # one number for everybody who migrates; transaction-level, so it is never left behind
_VERSIONS = """
create schema if not exists consumer;
create table if not exists consumer.schema_versions (
    version    integer primary key,
    name       text not null,
    checksum   text not null,
    applied_at timestamptz not null default now()
);
"""


class Migration(NamedTuple):
    """One file of migrations/, named NNNN_what_it_does.sql."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations() -> list[Migration]:
    """All migrations of this version of the package, oldest first."""
    files = [
        each for each in resources.files("consumer").joinpath("migrations").iterdir() if each.name.endswith(".sql")
    ]
    return [
        Migration(int(each.name[:4]), each.name[5:-4], each.read_text("utf-8"))
        for each in sorted(files, key=lambda f: f.name)
    ]


def as_sql() -> str:
    """All migrations as one script, with the bookkeeping, for people who apply SQL by other means."""
    parts = ["begin;", f"select pg_advisory_xact_lock({_LOCK});", _VERSIONS.strip()]
    for each in migrations():
        parts += [
            f"\n-- {each.version:04} {each.name}",
            each.sql.strip(),
            "insert into consumer.schema_versions (version, name, checksum) "
            f"values ({each.version}, '{each.name}', '{each.checksum}');",
        ]
    return "\n".join([*parts, "commit;", ""])


async def pending(connection: Any) -> list[Migration]:
    """Migrations that the database does not have. Changes nothing. Raises Misconfigured for one that was altered."""
    applied: dict[int, str] = {}
    if await connection.fetchval("select to_regclass('consumer.schema_versions') is not null"):
        rows = await connection.fetch("select version, checksum from consumer.schema_versions")
        applied = {row[0]: row[1] for row in rows}
    found = migrations()
    for each in found:
        if each.version in applied and applied[each.version] != each.checksum:
            raise Misconfigured(
                f"migration {each.version:04} ({each.name}) was applied with another text: the files of this installation "
                "were changed after the fact"
            )
    return [each for each in found if each.version not in applied]


async def migrate(connection: Any, *own: str) -> list[Migration]:
    """Apply what is pending, and then the SQL texts `own`, all in one transaction. Returns what was applied.

    Safe when several run at once: they wait for each other, and the later ones find nothing to do. Raises Misconfigured
    when `own` would land in our schema.
    """
    async with connection.transaction():
        await connection.execute(f"select pg_advisory_xact_lock({_LOCK})")
        todo = await pending(connection)
        if todo:
            await connection.execute(_VERSIONS)
        for each in todo:
            await connection.execute(each.sql)
            await connection.execute(
                "insert into consumer.schema_versions (version, name, checksum) values ($1, $2, $3)",
                each.version,
                each.name,
                each.checksum,
            )
        if own and await connection.fetchval("select current_schema()") == "consumer":
            # A role named like our schema: "$user" leads the search path, and your tables would land among ours.
            raise Misconfigured(
                "the first schema of this role's search path is `consumer`, which is ours: use a role of another name, "
                "or `alter role … set search_path = public`"
            )
        for text in own:
            await connection.execute(text)
    return todo
