"""`consumer migrate`: create or update the tables, print rights, rename handlers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from consumer.admin.ledger_access import connected, with_ledger
from consumer.app import App
from consumer.cli.framework import POSTGRES, MaybeApp, cli, command
from consumer.cli.operators import acted_by
from consumer.cli.per_shard import ShardName, app_or_none, named_app, over
from consumer.core.audit import Entry
from consumer.core.errors import Misconfigured
from consumer.handler_records import coverage
from consumer.postgres import audit, grants
from consumer.postgres import migrate as schema
from consumer.postgres.connection import dsn_label
from consumer.postgres.errors import redacted_message, sqlstate_of
from consumer.postgres.protocol import Connection
from consumer.settings import Settings
from consumer.sharding import shards

_PRINT, _OTHER = "Print only", "Other changes"

_Sql = Annotated[bool, typer.Option("--sql", help="print the SQL and change nothing", rich_help_panel=_PRINT)]
_Check = Annotated[
    bool,
    typer.Option("--check", help="change nothing; exit 1 if something is to be done", rich_help_panel=_PRINT),
]
_GrantsFor = Annotated[
    str | None,
    typer.Option(
        "--grants",
        metavar="ROLE",
        help="print the rights that a worker's role needs, and change nothing",
        rich_help_panel=_PRINT,
    ),
]
_ReadOnly = Annotated[
    bool,
    typer.Option(
        "--read-only",
        help="with --grants: those of a role for `status`, `show` and dashboards",
        rich_help_panel=_PRINT,
    ),
]
_PublishOnly = Annotated[
    bool,
    typer.Option(
        "--publish-only",
        help="with --grants: those of a web application's role for `app.publishing`",
        rich_help_panel=_PRINT,
    ),
]
_Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="your own SQL, run after ours in the same transaction; write it so that it may run again",
    ),
]
_NewEpoch = Annotated[
    bool,
    typer.Option(
        "--new-epoch",
        help="declare that the database was restored from a copy of its disk: Redis's marks end",
        rich_help_panel=_OTHER,
    ),
]
_RenameHandler = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--rename-handler",
        metavar="OLD NEW",
        help="give handler OLD of APP (or of its name) the name NEW in the ledger, and keep what it has settled; "
        "running workers reconnect, and those with the old code are refused",
        rich_help_panel=_OTHER,
    ),
]
_NewRoute = Annotated[
    bool,
    typer.Option(
        "--new-route",
        help="declare that the App's shards or route have changed, and every key that moves was moved "
        "(docs/how-to/shards.md); without it a change is refused",
        rich_help_panel=_OTHER,
    ),
]


@command(cli, "migrate", (*POSTGRES, "wait_"))
def migrate(
    settings: Settings,
    app: MaybeApp = None,
    sql: _Sql = False,
    check: _Check = False,
    files: _Files = None,
    grants_for: _GrantsFor = None,
    read_only: _ReadOnly = False,
    publish_only: _PublishOnly = False,
    new_epoch: _NewEpoch = False,
    rename_handler: _RenameHandler = None,
    shard: ShardName = None,
    new_route: _NewRoute = False,
) -> Any:
    """Create or update the ledger's tables (schema "consumer").

    Safe when several run at once. Run it as a role that owns the tables and that only this command uses. Workers need less:
    `consumer migrate --grants ROLE` prints what, as SQL for the owner.
    """
    print_only = [sql, check, grants_for is not None]
    if sum(print_only) > 1 or (any(print_only) and (files or new_epoch)):
        raise Misconfigured(
            "--sql, --check and --grants: each changes nothing; give one of them, and neither --file nor --new-epoch"
        )
    if read_only and publish_only:
        raise Misconfigured("--read-only and --publish-only: not together; give one of them")
    if grants_for is not None:
        purpose = grants.For.READER if read_only else grants.For.PUBLISHER if publish_only else grants.For.WORKER
        print(grants.as_sql(grants_for, purpose), end="")
        return 0
    if read_only or publish_only:
        flag = "--read-only" if read_only else "--publish-only"
        raise Misconfigured(f"{flag}: no effect alone; it goes with --grants ROLE")
    if sql:
        print(schema.as_sql(), end="")
        return 0
    own = _read(files or [])
    if new_route and (app is None or shard is not None or check):
        raise Misconfigured("--new-route: for all shards of an App; it goes with APP, without --shard and --check")
    if rename_handler is not None:
        if check or files or new_epoch or new_route:
            raise Misconfigured("--rename-handler: not with these flags; it goes with APP and --shard alone")
        if app is None:
            raise Misconfigured(
                "--rename-handler: no App is given; write `consumer migrate APP --rename-handler OLD NEW`"
            )
        named = named_app(app)
        return over(named.app, shard, settings, False, lambda on: _rename(on, named.name, *rename_handler))

    async def run(on: Settings) -> int:
        return await _migrate(on, check, own, new_epoch)

    return _migrate_shards(app_or_none(app), shard, settings, run, new_route)


def _read(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Read files of SQL; return paths and texts. Raises Misconfigured."""
    texts = []
    for path in files:
        try:
            texts.append((str(path), path.read_text("utf-8-sig")))
        except (OSError, UnicodeDecodeError) as error:
            raise Misconfigured(
                f"--file {path}: {getattr(error, 'strerror', None) or error}; name a text file that can be read"
            ) from None
    return texts


async def _migrate_shards(
    app: App | None,
    shard: str | None,
    settings: Settings,
    run: Callable[[Settings], Coroutine[Any, Any, int]],
    new_route: bool,
) -> int:
    code = await over(app, shard, settings, False, run)
    if new_route and app is not None:
        for name, on in shards.settings_of(app, settings).items():
            await with_ledger(on, partial(shards.forget, app, name))
        print("the shards and the route of the App are as they are now: workers may be started")
    return code


async def _rename(settings: Settings, app: str, old: str, new: str) -> int:
    if old == new or not new:
        raise Misconfigured("--rename-handler: OLD and NEW are one name; give two names")
    try:
        await with_ledger(settings, lambda connection: _rename_recorded(connection, app, old, new))
    except Exception as error:
        if sqlstate_of(error) is None:
            raise
        raise Misconfigured(
            f"{dsn_label(settings.dsn)}: {redacted_message(error)}; run it as the owner of the schema (nothing was changed)"
        ) from None
    print(f"handler {old!r} of App {app!r} is {new!r} in the ledger now; workers with the old name are refused")
    return 0


async def _rename_recorded(connection: Connection, app: str, old: str, new: str) -> None:
    by = acted_by(None, None)
    async with connection.transaction():
        await coverage.rename(connection, app, old, new, by.operator)
        await audit.record(connection, Entry("rename handler", by, f"{old} is {new}", app))


async def _migrate(settings: Settings, check: bool, own: Sequence[tuple[str, str]], new_epoch: bool) -> int:
    """Migrate one database. own: the user's SQL, as paths and texts."""
    connection = await connected(settings)
    try:
        if check:
            return _print_pending(await schema.pending(connection))
        names, texts = [name for name, _ in own], [text for _, text in own]
        applied = await schema.migrate(connection, *texts, names=names, new_epoch=new_epoch)
    except Exception as error:
        if sqlstate_of(error) is None:
            raise
        raise Misconfigured(f"{dsn_label(settings.dsn)}: {redacted_message(error)}; nothing was changed") from None
    finally:
        connection.terminate()
    for migration in applied:
        print(f"applied: {migration.version:04} {migration.name}")
    extra = f"; {len(own)} file(s) of your own were run" if own else ""
    extra += "; a new epoch has begun" if new_epoch else ""
    print(f"the schema is up to date{extra}")
    if applied:
        print("workers need few rights on it: `consumer migrate --grants ROLE` prints them")
    return 0


def _print_pending(pending: Sequence[schema.Migration]) -> int:
    for migration in pending:
        print(f"pending: {migration.version:04} {migration.name}")
    print("the schema is not up to date: run `consumer migrate`" if pending else "the schema is up to date")
    return 1 if pending else 0
