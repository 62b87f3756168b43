"""Applies the schema's migrations: numbered SQL files, each once.

All in one transaction, under one lock. The files are in migrations/, and have checksums. Migrations only add: workers
of the previous version continue with a migrated schema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from consumer.core.errors import Misconfigured
from consumer.postgres.protocol import Connection
from consumer.postgres.server import begin_epoch
from consumer.postgres.sql_text import transaction_control
from consumer.postgres.sql_tokens import first_words

_LOCK = 0x1DE_117  # one number for all who migrate; transaction-level, so it never stays behind
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
    """Return all migrations of this version of the package, oldest first."""
    files = [
        path
        for path in resources.files("consumer.postgres").joinpath("migrations").iterdir()
        if path.name.endswith(".sql")
    ]
    return [
        Migration(int(file.name[:4]), file.name[5:-4], file.read_text("utf-8"))
        for file in sorted(files, key=lambda f: f.name)
    ]


def as_sql() -> str:
    """Return all migrations as one script, to apply by other means."""
    parts = ["begin;", f"select pg_advisory_xact_lock({_LOCK});", _VERSIONS.strip()]
    for migration in migrations():
        parts += [
            f"\n-- {migration.version:04} {migration.name}",
            migration.sql.strip(),
            "insert into consumer.schema_versions (version, name, checksum) "
            f"values ({migration.version}, '{migration.name}', '{migration.checksum}');",
        ]
    return "\n".join([*parts, "commit;", ""])


async def pending(connection: Connection) -> list[Migration]:
    """Return the migrations that the database does not have.

    Raises Misconfigured for one that was altered.
    """
    applied: dict[int, str] = {}
    if await connection.fetchval("select to_regclass('consumer.schema_versions') is not null"):
        rows = await connection.fetch("select version, checksum from consumer.schema_versions")
        applied = {row[0]: row[1] for row in rows}
    known = migrations()
    for migration in known:
        if migration.version in applied and applied[migration.version] != migration.checksum:
            raise Misconfigured(
                f"migration {migration.version:04} ({migration.name}): it was applied with another text; restore the files of this "
                "installation, which were changed later"
            )
    return [migration for migration in known if migration.version not in applied]


def _line(error: Any, text: str) -> str:
    """Return the line of a text with the error, as :LINE."""
    position = getattr(error, "position", None)
    return f":{text.count(chr(10), 0, int(position) - 1) + 1}" if position and str(position).isdecimal() else ""


async def migrate(
    connection: Connection, *own: str, names: Sequence[str] = (), new_epoch: bool = False
) -> list[Migration]:
    """Apply pending migrations, then the SQL texts `own`; return what was applied.

    All in one transaction. names: of the texts, for errors. new_epoch: declare that Redis's marks are of another
    database. Several may run at once: they wait for each other, and the later ones find nothing to do. Raises
    Misconfigured when `own` would create tables in our schema, ends the transaction itself, or fails; nothing is
    changed then.
    """
    called = [*names, *[f"text {number}" for number in range(len(names), len(own))]]
    for name, text in zip(called, own, strict=False):
        if word := transaction_control(text):
            raise Misconfigured(f"{name}: {word} would end the transaction that all of it runs in; remove it")
    async with connection.transaction():
        # A second migration waits here until the first one ends.
        await connection.execute("set local lock_timeout = 0")
        await connection.execute(f"select pg_advisory_xact_lock({_LOCK})")
        await connection.execute("set local lock_timeout to default")
        todo = await pending(connection)
        if todo:
            await connection.execute(_VERSIONS)
        for migration in todo:
            await connection.execute(migration.sql)
            await connection.execute(
                "insert into consumer.schema_versions (version, name, checksum) values ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.checksum,
            )
        if own and await connection.fetchval("select current_schema()") == "consumer":
            # A role named like our schema: "$user" leads the search path, and your tables would land among ours.
            raise Misconfigured(
                "search_path: the first schema of this role is `consumer`, which is ours; use a role of another name, "
                "or `alter role … set search_path = public`"
            )
        for name, text in zip(called, own, strict=False):
            if first_words(text):  # else it is empty
                try:
                    await connection.execute(text)
                except Exception as error:
                    if getattr(error, "sqlstate", None) is None:
                        raise
                    # Its first argument: the rest of a PostgreSQL error may quote rows.
                    raise Misconfigured(
                        f"{name}{_line(error, text)}: {error.args[0]}; correct it (nothing was changed)"
                    ) from None
        if new_epoch:
            await begin_epoch(connection)
    return todo
