"""A rebuild of a long range learns its tables first.

From the first messages, before it begins.
"""

from __future__ import annotations

from typing import Any

from harness import Place, Sent, consume_all, query
from rebuild_runs import app_with_handler, message_id, rebuilt

from consumer import Tx

_COUNT = 20_400  # more than rebuild.py takes for a short range
_LATE = 20_000  # from here on another table is written


async def test_long_range_has_every_message_and_table_that_only_late_ones_write(place: Place) -> None:
    await query(place.dsn, "create table late (id bigint primary key)")
    calls: list[int] = []

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        calls.append(body["n"])
        tx.defer("insert into effects (id, account, amount) values ($1, $2, $3)", f"e{body['n']}", 1, body["n"])
        if body["n"] >= _LATE:
            tx.defer("insert into late values ($1)", body["n"])

    topic = await place.topic(4)
    app = app_with_handler(topic, handle)
    await place.send(
        topic,
        *[Sent({"n": n}, id=message_id(f"m{n}"), key=f"k{n % 100}", partition=n % 4) for n in range(_COUNT)],
    )
    await consume_all(app, place.settings())
    calls.clear()

    lines: list[str] = []
    result = await rebuilt(place, app, tell=lines.append)
    assert result.agrees and not result.unknown
    assert (result.messages, result.applied, result.repeated) == (_COUNT, _COUNT, 0)
    assert {table["table"]: table["rebuilt"] for table in result.tables} == {
        "public.effects": _COUNT,
        "public.late": _COUNT - _LATE,
    }
    assert sum("public.effects" in line for line in lines) == 1 and sum("public.late" in line for line in lines) == 1
    assert set(calls) == set(range(_COUNT))

    await query(place.dsn, "delete from effects where id = 'e12345'")
    await query(place.dsn, f"update late set id = -1 where id = {_LATE + 7}")
    result = await rebuilt(place, app)
    rows = {(row["table"], row["kind"]): row["count"] for row in result.differences}
    assert rows[("public.effects", "missing")] == 1 and not result.agrees
    assert ("public.late", "missing") in rows and ("public.late", "extra") in rows


async def test_messages_that_taught_the_tables_count_once(place: Place) -> None:
    """Nothing is learned later that would restart the rebuild and hide them."""

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into effects (id, account, amount) values ($1, $2, $3)", f"e{body['n']}", 1, body["n"])

    topic = await place.topic(4)
    app = app_with_handler(topic, handle)
    await place.send(
        topic,
        *[Sent({"n": n}, id=message_id(f"m{n}"), key=f"k{n % 100}", partition=n % 4) for n in range(_COUNT)],
    )
    await consume_all(app, place.settings())
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown
    assert (result.messages, result.applied, result.repeated) == (_COUNT, _COUNT, 0)
