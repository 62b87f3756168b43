"""Rebuilds of tables with random or clock values.

Values are left out only where two rebuilds show that they vary; everything else is compared.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from harness import Place, consume_all, migrated, query, value
from rebuild_runs import app_with_handler, numbered, rebuilt, unknown_kinds

from consumer import App, Tx
from consumer.rebuild.drawn_values import DRAWN, ColumnValues, find_drawn
from consumer.rebuild.table_model import Name

_MADE = Name("public", "made")


async def applied(place: Place, ddl: str, handle: Any, count: int = 5) -> App:
    """An App whose handler has had that many messages."""
    await migrated(place.dsn, ddl)
    topic = await place.topic()
    app = app_with_handler(topic, handle)
    await place.send(topic, *numbered(count))
    await consume_all(app, place.settings())
    return app


WAYS: dict[str, tuple[str, Callable[[int], tuple[Any, ...]]]] = {
    "Python's uuid as a key": ("id uuid primary key, n int", lambda n: (uuid.uuid4(), n)),
    "a volatile function": ("id float default draw(), n int", lambda n: (n,)),
    "Python's time": ("id timestamp, n int", lambda n: (datetime.now(UTC).replace(tzinfo=None), n)),
}


@pytest.mark.parametrize("way", WAYS)
async def test_drawn_values_are_left_out_and_every_other_fault_is_found(place: Place, way: str) -> None:
    columns, row = WAYS[way]

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        values = row(body["n"])
        names = "id, n" if len(values) == 2 else "n"
        tx.defer(f"insert into made ({names}) values ({', '.join(f'${n}' for n in range(1, len(values) + 1))})", *values)  # fmt: skip

    ddl = f"create function draw() returns float language sql volatile as 'select random()'; create table made ({columns})"
    app = await applied(place, ddl, handle)
    result = await rebuilt(place, app)
    assert result.agrees and not result.unknown and not result.differences
    assert result.tables[0]["ignored"] == {"id": DRAWN}
    assert any(note.startswith("public.made.id is drawn") for note in result.notes)
    await query(place.dsn, "update made set n = 77 where n = 2")
    result = await rebuilt(place, app)
    assert not result.agrees and not result.unknown
    await query(place.dsn, "delete from made where n = 77")
    result = await rebuilt(place, app)
    assert [difference["kind"] for difference in result.differences] == ["missing"] and not result.unknown


async def test_drawn_values_of_another_kind_or_null_are_no_proof(place: Place) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into made values ($1, $2)", str(uuid.uuid4()), body["n"])

    app = await applied(place, "create table made (id text, n int)", handle)
    result = await rebuilt(place, app, compare=["made.id"])
    assert unknown_kinds(result) == ["depends_on_order"]
    await query(place.dsn, "update made set id = 'foreign' where n = 1")
    assert unknown_kinds(await rebuilt(place, app)) == ["depends_on_order"]
    await query(place.dsn, "update made set id = null where n = 1")
    result = await rebuilt(place, app)
    assert not result.agrees and not result.unknown


async def test_column_that_is_drawn_in_some_rows_only_is_no_agreement(place: Place) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into made values ($1, $2)", "fixed" if body["n"] == 1 else uuid.uuid4().hex, body["n"])

    app = await applied(place, "create table made (id text, n int)", handle)
    await query(place.dsn, "update made set id = md5('altered') where n = 1")
    assert unknown_kinds(await rebuilt(place, app)) == ["depends_on_order"]


async def test_time_that_a_message_moves_is_no_agreement(place: Place) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into made values (now() + $1 * interval '1 day')", body["n"])

    app = await applied(place, "create table made (due timestamptz)", handle, 1)
    await query(place.dsn, "update made set due = due - interval '1 day'")
    assert set(unknown_kinds(await rebuilt(place, app))) == {"depends_on_order"}


async def test_sum_that_a_process_keeps_is_no_drawn_value(place: Place) -> None:
    numbers = itertools.count(1)

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        tx.defer("insert into made values ($1, $2)", next(numbers), body["n"])

    app = await applied(place, "create table made (id int, n int)", handle)
    assert unknown_kinds(await rebuilt(place, app)) == ["depends_on_order"]


async def test_drawn_value_that_several_messages_change_is_no_agreement(place: Place) -> None:
    async def handle(body: dict[str, Any], tx: Tx) -> None:
        sql = "insert into made values ($1, $2) on conflict (k) do update set token = excluded.token"
        tx.defer(sql, body["n"] % 2, str(uuid.uuid4()))

    app = await applied(place, "create table made (k int primary key, token text)", handle)
    assert unknown_kinds(await rebuilt(place, app)) == ["depends_on_order"]


async def test_drawn_key_that_another_table_refers_to_is_no_agreement(place: Place) -> None:
    """Which child belongs to which parent would not be compared."""

    async def handle(body: dict[str, Any], tx: Tx) -> None:
        id = str(uuid.uuid4())
        tx.defer("insert into made values ($1, $2)", id, body["n"])
        tx.defer("insert into child values ($1, $2)", id, body["n"])

    app = await applied(place, "create table made (id text, n int); create table child (made text, n int)", handle)
    assert set(unknown_kinds(await rebuilt(place, app))) == {"depends_on_order"}
    assert await value(place.dsn, "select count(*) from child") == 5


def _values(*hashes: int, length: int | None = None) -> ColumnValues:
    return ColumnValues(frozenset(hashes), length)


@pytest.mark.parametrize(
    ("first", "again", "varying", "columns"),
    [
        ({"a": _values(1, 2)}, {"a": _values(3, 4)}, {"a"}, {"a"}),
        ({"a": _values(1, 2)}, {"a": _values(2, 4)}, {"a"}, set()),
        ({"a": _values(1, 2)}, {"a": _values(3, 4)}, {"a", "n"}, set()),
        ({"a": _values(1, 2), "b": _values(5)}, {"a": _values(3), "b": _values(6)}, {"a", "b"}, {"a", "b"}),
        ({"a": _values(1, 2), "b": _values(2)}, {"a": _values(3), "b": _values(6)}, {"a", "b"}, set()),
        ({"a": _values(1, length=3)}, {"a": _values(3, length=4)}, {"a"}, set()),
        ({"a": _values(1)}, {}, {"a"}, set()),
        ({"a": _values(1)}, {"a": _values(2)}, None, set()),
    ],
)
def test_drawn_columns_are_those_in_which_nothing_is_given_twice(
    first: dict[str, ColumnValues], again: dict[str, ColumnValues], varying: set[str] | None, columns: set[str]
) -> None:
    varying_columns = {} if varying is None else {_MADE: varying}
    mine, others = ({(_MADE, column): values for column, values in which.items()} for which in (first, again))
    assert find_drawn(mine, others, varying_columns) == {(_MADE, column) for column in columns}
