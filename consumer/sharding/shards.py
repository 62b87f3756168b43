"""Checks the databases of one App, so that mix-ups are refused.

Knows the tables `shards` and `route_probes`; core/shard_route.py decides which message goes where. Every shard
remembers its own name, the names of all, and a bounded number of keys with the shard that the route sent them to.
Limitations: the answers for keys that were never recorded are unknown; so worker/shard_check.py also asks the other
shards about messages that may have been applied before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from consumer.app import App
from consumer.core.delivery import Delivery
from consumer.core.errors import Misconfigured
from consumer.core.shard_route import RECORDED_MAX, Probes, RouteFault, Router, explain_change, shown
from consumer.postgres import positions, shard_tables
from consumer.postgres.connection import dsn_label, translated_errors
from consumer.postgres.epoch import lineage
from consumer.postgres.protocol import Connection
from consumer.postgres.session import Session
from consumer.settings import Settings


def settings_of(app: App, settings: Settings) -> dict[str, Settings]:
    """Return the settings of each shard, by name.

    They are the worker's, with the shard's address. Without shards there is one, whose name is empty. Raises
    Misconfigured for a variable that is not set.
    """
    if not app.shards:
        return {"": settings}
    by_name = {}
    for name, address in app.shards.items():
        if address.startswith("env:"):
            variable = address.removeprefix("env:").strip()
            address = os.environ.get(variable, "")
            if not address:
                raise Misconfigured(
                    f"shard {name!r} of App {app.name!r}: {variable} is not set; set it to the shard's DSN"
                )
        by_name[name] = settings.at(address)
    return by_name


async def check(app: App, router: Router, opened: Sequence[tuple[Settings, Session]]) -> None:
    """Compare what the databases remember with the App; record what is new.

    opened: in the App's order. Raises Misconfigured, RouteFault and Outage.
    """
    names = list(app.shards)
    by_lineage: dict[str, str] = {}
    for name, (_, session) in zip(names, opened, strict=bool(names)):
        if (other := by_lineage.setdefault(lineage(session.epoch), name)) != name:
            raise Misconfigured(
                f"shards {other!r} and {name!r} of App {app.name!r}: they are one database; give each its own (or, if one is "
                "a copy of the other, run `consumer migrate --new-epoch` on it)"
            )
    fixed = router.fixed_probes() if names else {}
    for place, (settings, session) in enumerate(opened):
        name = names[place] if names else ""
        with translated_errors(settings):
            await _enroll(app, name, settings, session)
            if names:
                await _check_route(app, name, router, session, fixed)


async def _enroll(app: App, name: str, settings: Settings, session: Session) -> None:
    names = sorted(app.shards)
    connection = session.connection
    row = await shard_tables.enrolled(connection, app.name)
    if row is None and name:
        if await positions.exist(connection, app.name):
            raise Misconfigured(
                f"{dsn_label(settings.dsn)}: it has applied messages of App {app.name!r} without shards, which the other shards "
                "would apply again; see docs/how-to/shards.md, then run `consumer migrate APP --new-route`"
            )
        await shard_tables.enroll(connection, app.name, name, names)
        row = await shard_tables.enrolled(connection, app.name)
    if row is None:
        return  # an App without shards
    if not name:
        raise Misconfigured(
            f"{dsn_label(settings.dsn)}: it is shard {row.shard!r} of App {app.name!r}, and the App has none; give it shards= and route="
        )
    if row.shard != name:
        raise Misconfigured(
            f"{dsn_label(settings.dsn)}: it is shard {row.shard!r} of App {app.name!r}, and its address is given for {name!r}; "
            "swap them back, or rename the shard with `consumer migrate APP --new-route`"
        )
    if row.shards != names:
        raise Misconfigured(
            f"App {app.name!r}: it has the shards {', '.join(names)}, and had {', '.join(row.shards)}, so keys that move would be "
            "applied again; move them as docs/how-to/shards.md says, then run `consumer migrate APP --new-route`"
        )


async def _check_route(app: App, name: str, router: Router, session: Session, fixed: Probes) -> None:
    connection = session.connection
    if not await shard_tables.has_probes(connection, app.name):
        async with connection.transaction():
            for shard in app.shards:
                keys = [key for key, to in fixed.items() if to == shard]
                await shard_tables.record_probes(connection, app.name, keys, shard)
    probes = await shard_tables.probes(connection, app.name)
    if change := router.changed(dict(probes)):
        raise RouteFault(explain_change(app.name, change))
    router.start_recording(name, RECORDED_MAX + len(fixed) - len(probes))


async def record(app: App, name: str, router: Router, session: Session) -> None:
    """Record recently seen keys in their shard.

    Raises RouteFault if the shard remembers another answer for one.
    """
    keys = router.to_record(name)
    if not keys:
        return
    connection = session.connection
    await shard_tables.record_probes(connection, app.name, keys, name)
    if probes := await shard_tables.contradicting_probes(connection, app.name, keys, name):
        raise RouteFault(explain_change(app.name, (probes[0].key, probes[0].shard, name)))


async def forget(app: App, name: str, connection: Connection) -> None:
    """Start over with the App's current shard names and route.

    Call it only after the keys that the route moves were moved.
    """
    async with connection.transaction():
        await shard_tables.forget(connection, app.name)
        if name:
            await shard_tables.enroll(connection, app.name, name, sorted(app.shards))


def stray(app: str, delivery: Delivery, there: str, here: str) -> RouteFault:
    """Return the error for a message that another shard holds."""
    record = delivery.record
    return RouteFault(
        f"message {record.topic}:{record.partition}:{record.offset} with key {shown(record.key)} stands in shard {there!r} by handler "
        f"{delivery.handler.name!r} of App {app!r}, and the route now names {here!r}: it was not applied again. Put the old route "
        "back, or move the keys as docs/how-to/shards.md says"
    )
