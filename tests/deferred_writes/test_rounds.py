from __future__ import annotations

from collections import Counter
from decimal import Decimal
from enum import IntEnum, StrEnum
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.deferred_writes.grammar import shape_of
from consumer.deferred_writes.rounds import are_keys, split_by_key_use, sum_by_key

pytestmark = pytest.mark.unit

TYPES = ["int4", "int8"]
UPDATE = "update accounts set balance = balance + $2 where id = $1"


@pytest.mark.parametrize(
    ("sql", "types", "wanted"),
    [
        (
            "insert into payments values ($1, $2, $3)",
            ["uuid", "int4", "int8"],
            "insert into payments select consumer_r.consumer_c1, consumer_r.consumer_c2, consumer_r.consumer_c3 from "
            "unnest($1::pg_catalog.uuid[], $2::pg_catalog.int4[], $3::pg_catalog.int8[]) "
            "as consumer_r(consumer_c1, consumer_c2, consumer_c3)",
        ),
        (
            'INSERT INTO s."Pay" (id, at) VALUES ($1, now()) ON CONFLICT (id) DO NOTHING',
            ["int8"],
            'insert into s."Pay" (id, at) select consumer_r.consumer_c1, now ( ) from '
            "unnest($1::pg_catalog.int8[]) as consumer_r(consumer_c1) on conflict (id) do nothing",
        ),
        (
            UPDATE,
            ["int4", "int8"],
            "update accounts set balance = balance + consumer_r.consumer_c2 from "
            "unnest($1::pg_catalog.int4[], $2::pg_catalog.int8[]) as consumer_r(consumer_c1, consumer_c2) "
            "where id = consumer_r.consumer_c1",
        ),
        (
            "delete from carts c where c.id = $1 and c.state <> $2",
            ["uuid", "text"],
            "delete from carts as c using unnest($1::pg_catalog.uuid[], $2::pg_catalog.text[]) "
            "as consumer_r(consumer_c1, consumer_c2) where c . id = consumer_r.consumer_c1 and c . state <> consumer_r.consumer_c2",
        ),
        (
            "insert into seen (id, n) values ($1, $2) on conflict (id) do update set n = seen.n + $2, at = now()",
            ["int4", "int8"],
            "insert into seen (id, n) select consumer_r.consumer_c1, consumer_r.consumer_c2 from "
            "unnest($1::pg_catalog.int4[], $2::pg_catalog.int8[]) as consumer_r(consumer_c1, consumer_c2) "
            'on conflict (id) do update set n = seen . n + excluded."n", at = now ( )',
        ),
    ],
)
def test_statement_for_many_rows_reads_as_expected(sql: str, types: list[str], wanted: str) -> None:
    shape = shape_of(sql)
    assert shape is not None
    assert " ".join(shape.text(types).split()) == wanted


@pytest.mark.parametrize(
    ("sql", "keys"),
    [
        (UPDATE, (("id", 0),)),
        ('update a set b = b + $1 where "id" = $2 and a.kind = $3', (("id", 1), ("kind", 2))),
        ("update s.a x set b = $1 where $2 = x.id and x.b > 0", (("id", 1),)),
        ("update a as x set b = $1 where (id = $2 or true) and c = $3", (("c", 2),)),
        ("update a set b = $1 where id = $2 and b = $3", (("id", 1),)),  # b changes: it identifies no row
    ],
)
def test_columns_that_identify_rows(sql: str, keys: tuple[tuple[str, int], ...]) -> None:
    shape = shape_of(sql)
    assert shape is not None and shape.keys == keys


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "select $1",
        "delete from a",
        "delete from a where id > $1",
        "delete from a where id = $1 or true",
        "delete from a where id = $1 returning id",
        "delete from a using b where a.id = $1",
        "delete from only a where id = $1",
        "insert into a values (1)",
        "insert into a values ($2)",
        "insert into a values ($1), ($2)",
        "insert into a values ($1, default)",
        "insert into a values ((select max(x) from a) + $1)",
        "insert into a values ($1, nextval('s'))",
        "insert into a values ($1, f($1))",
        "insert into a values ($1, s.now())",
        'insert into a values ($1, "now"())',
        "insert into a values ($1) returning id",
        "insert into a values ($1) on conflict (id) do update set x = $1",
        "insert into a (id) values ($1) on conflict do update set x = 1",
        "insert into a (id, b) values ($1, $2) on conflict (id, b) do update set x = 1",
        "insert into a (id) values ($1) on conflict on constraint k do update set x = 1",
        "insert into a (id) values ($1 + 1) on conflict (id) do update set x = 1",
        "insert into a (id) values ($1) on conflict (id) do update set id = 1",
        "insert into a (id) values ($1) on conflict (id) do update set x = 1 where f(a.x)",
        "insert into a (id) values ($1) on conflict (id) do update set x = (select 1)",
        "insert into a (id) values ($1) on conflict (id) do update set x = y.x",
        "update a set b = x.b where id = $1",
        "update a set b = $2::mood where id = $1",
        "update a set b = app.f(b) where id = $1",
        "update a set b = b where id = $1 and x like 'y'",
        "insert into a values ($1) on conflict (id) where x do nothing",
        "insert into a values ($1) -- and more",
        "insert into a values ($1 /* no */)",
        "insert into a values ($1); delete from a",
        "insert into a values ($1)) ",
        "insert into a values ($1, E'\\'')",
        "insert into a values ($1, 'a' \n 'b')",
        "insert into a values ($1, $$x$$)",
        "insert into a values ($1, array[1])",
        "insert into a select $1",
        "with x as (select 1) insert into a values ($1)",
        "update a set b = $1",
        "update a set b = $1 where id = 1",
        "update a set b = $1 where id = $2 or id = $3",
        "update a set id = $1 where id = $2",
        'update a set "id" = $1 where id = $2',
        'update a set id = $1 where "id" = $2',
        "update a set b = $1 where id > $2",
        "update a set b = $1 where id = $2 + 1",
        "update a set b = $1 where lower(id) = $2",
        "update a set b = $1 where other.id = $2",
        "update a set b = (select count(*) from a) where id = $1",
        "update a set b = f(b) where id = $1",
        "update a set b = $1 where id = $2 returning b",
        "update a set b = x.b from x where a.id = $1",
        "update only a set b = 1 where id = $1",
        "update a set (b, c) = ($1, $2) where id = $3",
        "update a set b = case when b > 0 then $1 end where id = $2",
        "update a set b = $1 where id = $2 and c in (1, 2)",
        "update a set b = $1 where not (id = $2)",
        "update a set b = $1 where current of c",
        "update é set b = $1 where id = $2",
        "update a set b = $1x where id = $2",
    ],
)
def test_statement_outside_the_grammar_runs_as_it_is(sql: str) -> None:
    assert shape_of(sql) is None


@given(st.text(alphabet="insertupdasw ($1),='\"-/*;.:<>|e\n", max_size=60))
def test_any_text_is_read_or_refused(sql: str) -> None:
    shape_of(sql)
    shape_of(f"update a set b = $1 where id = $2 {sql}")
    shape_of(f"insert into a values ($1, {sql})")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers()), min_size=1, max_size=60))
def test_round_meets_a_row_once_and_keeps_its_order(arguments: list[tuple[int, int]]) -> None:
    shape = shape_of(UPDATE)
    assert shape is not None
    numbered = [(key, place) for place, (key, _) in enumerate(arguments)]
    rounds = split_by_key_use(numbered, shape, TYPES)
    assert rounds is not None
    for rows in rounds:
        keys = [key for key, _ in rows]
        assert keys == sorted(set(keys))
    executed = [write for rows in rounds for write in rows]
    assert Counter(executed) == Counter(numbered)
    for key in range(6):
        places = [place for other, place in executed if other == key]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("sql", "added"),
    [
        (UPDATE, (("balance", 1),)),
        ("update a set b = b - $1, c = $2 + a.c, at = now() where id = $3 and kind = $4", (("b", 0), ("c", 1))),
        ("update a x set \"b\" = x.b + $1, state = 'paid' where $2 = x.id", (("b", 0),)),
        ("update a set b = $1 where id = $2", ()),
        ("update a set b = b + 1 where id = $1", ()),
        ("update a set b = $2 - b where id = $1", ()),
        ("update a set b = b * $2 where id = $1", ()),
        ("update a set b = b + $2 * 2 where id = $1", ()),
        ("update a set b = c + $2 where id = $1", ()),
        ("update a set b = b + $2, c = $3 where id = $1", ()),
        ("update a set b = b + $2, c = b where id = $1", ()),
        ("update a set b = b + $2, c = gen_random_uuid() where id = $1", ()),
        ("update a set b = b + $2, c = c + $2 where id = $1", ()),
        ("update a set b = b + $1 where id = $1", ()),
        ("update a set b = b + $2 where id = $1 and b >= 0", ()),
        ("update a set b = b + $2 where id = $1 and b >= $2", ()),
        ("update a set b = b + $2 where id = $1 and (c = $3 or c = $3)", ()),
        ("insert into a values ($1, $2)", ()),
    ],
)
def test_additions_of_a_statement_are_recognized(sql: str, added: tuple[tuple[str, int], ...]) -> None:
    shape = shape_of(sql)
    assert shape is not None and shape.added == added


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9), st.integers(0, 9)), min_size=1, max_size=40))
def test_sums_add_up_and_no_key_of_both_signs_is_summed(arguments: list[tuple[int, int, int]]) -> None:
    shape = shape_of("update a set b = b + $2, c = c - $3 where id = $1")
    assert shape is not None
    sums = sum_by_key(arguments, shape, ["int4"] * 3)
    assert sums is not None
    summed, alone = sums
    keys = [row[0] for row in summed]
    assert keys == sorted(set(keys))
    both = {key for key in range(5) if {n > 0 for k, n, _ in arguments if k == key and n} == {True, False}}
    assert not both.intersection(keys)
    assert alone == [row for row in arguments if row[0] in both]
    for key in range(5):
        rows = [*(row for row in summed if row[0] == key), *(row for row in alone if row[0] == key)]
        for place in (1, 2):
            assert sum(row[place] for row in rows) == sum(row[place] for row in arguments if row[0] == key)


@pytest.mark.parametrize(
    "arguments",
    [
        [(1, 1), (1, 2**31 - 1)],  # a sum that its parameter cannot hold, although each of its parts could be held
        [(1, -1), (1, -(2**31))],
        [(1, 2**31), (2, 1)],
        [(1, True), (1, 1)],
        [(1, None), (1, 1)],
        [(1, 1.5), (1, 1)],
        [(None, 1), (1, 1)],
        [(1, 1), (1, 1, 1)],
        [(1.0, 1), (1.0, 1)],
    ],
)
def test_arguments_that_cannot_be_summed_are_left_alone(arguments: list[tuple[object, ...]]) -> None:
    shape = shape_of(UPDATE)
    assert shape is not None
    assert sum_by_key(arguments, shape, ["int4", "int4"]) is None


@pytest.mark.parametrize(
    "arguments",
    [
        [(1, 1), (True, 1)],  # one row for PostgreSQL, and one for Python: but not of one type
        [(1, 1), ("1", 1)],
        [(None, 1), (None, 2)],
        [(1.0, 1), (2.0, 1)],
        [(1, [1]), (2, [2])],
        [(1, 1), (2,)],
        [(1, 1), (2, 1, 1)],
        [(1, "x" * (9 << 20)), (2, "x" * (9 << 20))],
        [(str(UUID(int=10)), 1), (1, 1)],
    ],
)
def test_values_that_do_not_fit_the_type_are_left_alone(arguments: list[tuple[object, ...]]) -> None:
    shape = shape_of(UPDATE)
    assert shape is not None
    assert split_by_key_use(arguments, shape, TYPES) is None


def test_rows_of_an_insert_stay_in_order() -> None:
    shape = shape_of("insert into a values ($1)")
    assert shape is not None
    rows = [(uuid4(),) for _ in range(20)]
    assert split_by_key_use(rows, shape, ["uuid"]) == [rows]


def test_types_are_names_that_are_known() -> None:
    shape = shape_of("insert into a values ($1)")
    assert shape is not None
    with pytest.raises(ValueError):
        shape.text(["int4[]; drop table a"])
    with pytest.raises(ValueError):
        shape.text([])


A = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


def test_rounds_spellings_of_one_uuid_are_one_key() -> None:
    shape = shape_of(UPDATE)
    assert shape is not None
    spellings = [A, A.upper(), A.replace("-", ""), UUID(A)]
    rounds = split_by_key_use([(spelling, n) for n, spelling in enumerate(spellings)], shape, ["uuid", "int8"])
    assert rounds == [[(spelling, n)] for n, spelling in enumerate(spellings)]
    summed = sum_by_key([(spelling, 1) for spelling in spellings], shape, ["uuid", "int8"])
    assert summed == ([[A, 4]], [])


class Kind(StrEnum):
    ONE = "one"


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("uuid", ["{" + A + "}", A]),
        ("uuid", ["urn:uuid:" + A, A]),
        ("uuid", [A + " ", A]),
        ("uuid", [1, A]),
        ("text", [Kind.ONE, "one"]),
        ("text", [Text("one"), "one"]),
        ("text", [b"one", "one"]),
        ("text", [None, "one"]),
        ("int4", [True, 1]),
        ("int4", [1.0, 1]),
        ("int4", [Decimal(1), 1]),
        ("int4", [IntEnum("Two", ["a"]).a, 1]),  # type: ignore[attr-defined]
    ],
)
def test_rounds_values_off_the_list_are_no_keys(kind: str, values: list[object]) -> None:
    shape = shape_of(UPDATE)
    assert shape is not None
    assert split_by_key_use([(value, 1) for value in values], shape, [kind, "int8"]) is None
    assert sum_by_key([(value, 1) for value in values], shape, [kind, "int8"]) is None


@pytest.mark.parametrize(
    ("column", "parameter", "known"),
    [
        *[("int4", "int8", True), ("text", "varchar", True), ("uuid", "uuid", True)],
        *[("uuid", "text", False), ("numeric", "numeric", False), ("timestamptz", "timestamptz", False)],
        *[("bytea", "bytea", False), ("bpchar", "bpchar", False), ("bool", "bool", False), ("float8", "float8", False)],
        *[("text", "", False), ("citext", "citext", False), ("int4", "numeric", False)],
    ],
)
def test_are_keys_only_pairs_on_the_list(column: str, parameter: str, known: bool) -> None:
    assert are_keys(column, parameter) is known
