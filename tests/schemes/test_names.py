from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.identifiers import column_names, columns_of, ident, table_ident
from consumer.schemes.unique import insert_once

pytestmark = pytest.mark.unit

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=15)


@given(NAMES)
def test_a_name_is_quoted_so_that_nothing_in_it_ends_the_quotes(name: str) -> None:
    quoted = ident(name)
    assert quoted[0] == quoted[-1] == '"'
    assert quoted[1:-1].replace('""', "").count('"') == 0
    assert quoted[1:-1].replace('""', '"') == name


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64, "ä" * 32])
def test_invalid_name_is_refused_and_not_cut(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        ident(name)


@pytest.mark.parametrize("name", [None, 1, b"t", ["t"]])
def test_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(TypeError):
        ident(name)
    with pytest.raises(TypeError):
        table_ident(name)


def test_a_table_may_have_a_schema() -> None:
    assert table_ident("orders") == '"orders"'
    assert table_ident("shop.Orders") == '"shop"."Orders"'
    for wrong in ("a.b.c", ".a", "a.", ""):
        with pytest.raises(ValueError):
            table_ident(wrong)


def test_columns_are_named_once_and_there_is_one_at_least() -> None:
    assert column_names("key", "id") == ["id"]
    assert column_names("key", ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="key: name at least one column"):
        column_names("key", [])
    with pytest.raises(ValueError, match="twice"):
        column_names("key", ["a", "a"])
    with pytest.raises(TypeError, match="row is a mapping"):
        not_a_mapping: Any = [("a", 1)]
        columns_of("row", not_a_mapping)


async def test_postgresql_takes_the_worst_name_for_what_it_is(connection: asyncpg.Connection) -> None:
    name = """x"); drop table "victim"; --'$1 Ä"""
    await connection.execute('create table "victim" (id int)')
    await connection.execute(f"create table {ident(name)} ({ident(name)} int primary key)")
    assert await insert_once(connection, name, {name: 1}, name)
    assert await connection.fetchval(f"select {ident(name)} from {ident(name)}") == 1
    assert await connection.fetchval("select count(*) from victim") == 0
