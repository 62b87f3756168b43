from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.errors import TransactionMisuse
from consumer.postgres.sql_settings import changes_setting, check_setting
from consumer.postgres.sql_text import refuse_transaction_control, traits

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "sql",
    [
        "select set_config('a.b', '1', true)",
        "SELECT SET_CONFIG ('a.b', '1', false)",
        "select \"set_config\"('a.b', '1', true)",
        "select pg_catalog.set_config('a.b', '1', true)",
        "select pg_catalog . \"set_config\" /* x */ ('a.b', '1', true)",
        "select set_config -- x\n ('a.b', '1', true)",
        "with x as (select set_config('a.b', '1', true)) select 1",
        "insert into log select coalesce(set_config('a.b', '1', true), '')",
        "select 1; select set_config('a.b', '1', true)",
        "select U&\"set\\005fconfig\"('a.b', '1', true)",
        "select U&\"set!005Fconfig\" uescape '!' ('a.b', '1', true)",
        "select u&\"set\\+00005fconfig\"('a.b', '1', true)",
        "do $$ begin perform set_config('a.b', '1', true); end $$",
        "do $x$ begin perform pg_catalog.\"set_config\"('a.b', '1', true); end $x$",
        "do 'begin perform set_config(''a.b'', ''1'', true); end'",
        "do $$ begin execute 'select set_config(''a.b'', ''1'', true)'; end $$",
        "do $$ begin set a.b = '1'; end $$",
        "do language plpgsql $$ begin if true then set local a.b to '1'; end if; end $$",
        "do $$ begin /* x */ reset a.b; end $$",
        "do $$ begin execute 'set a.b = 1'; end $$",
        "do $$ begin <<here>> set a.b = 1; end $$",
        "do $$ begin execute E' set local a.b = 1'; end $$",
        "do $$ begin execute format('set local a.b = %L', 'x'); end $$",
        "do $$ begin execute ('reset all'); end $$",
        "do $$ begin execute $x$set role a$x$; end $$",
        "do 'begin execute ''set a.b = 1''; end'",
        "do E'begin\\nset a.b = 1; end'",
        "update pg_settings set setting = '1' where name = 'a.b'",
        "update pg_catalog.\"pg_settings\" set setting = '1'",
    ],
)
def test_changes_setting_in_any_form_is_found(sql: str) -> None:
    assert changes_setting(sql)
    with pytest.raises(TransactionMisuse, match="set_local"):
        refuse_transaction_control(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "select 'set_config(1)'",
        "select 1 -- set_config('a')",
        "select 1 /* set_config('a') */",
        "select E'\\'set_config(', 1",
        "select $$set_config('a.b', '1', true)$$",
        "insert into log values ('set_config (x)')",
        "select set_config from t",
        "select my_set_config(1), set_config_x(1)",
        "select setting from pg_settings",
        "update t set a = 1 where b = 'pg_settings'",
        "do $$ begin update t set a = 1; end $$",
        "do $$ begin execute 'update t set a = 1'; end $$",
        "do $$ begin raise notice 'reset it'; end $$",
        "do $$ begin -- set_config('a')\n perform 1; end $$",
        "do $$ begin set constraints all deferred; end $$",
        "update t set a = 1",
    ],
)
def test_changes_setting_the_same_text_elsewhere_passes(sql: str) -> None:
    assert not changes_setting(sql)
    refuse_transaction_control(sql)


@given(st.text(alphabet="set_config(pgU&\"'$\\/*-;do \n", max_size=60))
def test_changes_setting_any_text_is_read(sql: str) -> None:
    changes_setting(sql)
    changes_setting(f"do {sql}")
    traits(sql)


@pytest.mark.parametrize("name", ["app.tenant", "App.tenant_id", "a.b.c", "_a.b$"])
def test_check_setting_takes_dotted_names(name: str) -> None:
    check_setting(name, "x")


@pytest.mark.parametrize(
    ("sql", "several", "changes", "temporary"),
    [
        ("select 1", False, False, False),
        ("select 1;", False, False, False),
        ("select 1; -- x\n", False, False, False),
        ("select ';'; select 2", True, False, False),
        ("create table t (n int)", False, True, False),
        ("create temp table t (n int)", False, True, True),
        ("select 1 into temporary t", False, True, True),
        ("insert into t select 1", False, False, False),
        ("with x as (insert into t select 1) select 1", False, False, False),
        ("with x as (select 1) select * into t from x", False, True, False),
        ("do $$ begin end $$", False, True, False),
        ("call f()", False, True, False),
        ("truncate t", False, False, False),
    ],
)
def test_traits_of_texts(sql: str, several: bool, changes: bool, temporary: bool) -> None:
    shown = traits(sql)
    assert (shown.several, shown.changes_schema, shown.makes_temporary) == (several, changes, temporary)
