"""Reads the definition of tables from PostgreSQL's catalog."""

from __future__ import annotations

from consumer.core.errors import Misconfigured
from consumer.postgres.protocol import Connection
from consumer.rebuild.table_model import Column, ColumnName, Constraint, DefaultSequence, Name, Table

_TABLE = """
select c.oid, row_security_active(c.oid),
       array(select tgname::text from pg_trigger where tgrelid = c.oid and not tgisinternal and tgenabled <> 'D' order by 1),
       array(select rulename::text from pg_rewrite where ev_class = c.oid and ev_enabled <> 'D' order by 1)
from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2
"""
_TABLE_COLUMNS = """
select a.attname::text, a.attnotnull or t.typnotnull, coalesce(pg_get_expr(d.adbin, d.adrelid), t.typdefault),
       a.attidentity <> '', a.attgenerated <> '', b.typname::text, b.typcategory::text,
       b.typnamespace = 'pg_catalog'::regnamespace,
       array(select s.oid::regclass::text || chr(10) || s.relname from pg_depend p
             join pg_class s on s.oid = p.refobjid and s.relkind = 'S'
             where p.classid = 'pg_attrdef'::regclass and p.objid = d.oid and p.refclassid = 'pg_class'::regclass)
from pg_attribute a join pg_type t on t.oid = a.atttypid
join pg_type b on b.oid = case when t.typtype = 'd' then t.typbasetype else t.oid end
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum
"""
_TABLE_KEYS = """
select array(select a.attname::text from unnest(i.indkey::int2[]) with ordinality as k(number, place)
             join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
             where k.place <= i.indnkeyatts order by k.place)
from pg_index i where i.indrelid = $1 and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
  and not exists (select from unnest(i.indkey::int2[]) with ordinality as k(number, place)
                  join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.number
                  where k.place <= i.indnkeyatts and not a.attnotnull)
order by i.indisprimary desc, i.indnkeyatts, i.indexrelid
"""
_CONSTRAINTS = """
select conname::text, pg_get_constraintdef(oid), condeferrable, condeferred from pg_constraint
where conrelid = $1 and contype in ('p', 'u', 'x') order by conname
"""

_ALL_COLUMNS = """
select n.nspname, c.relname, a.attname from pg_attribute a
join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and c.relpersistence <> 't' and a.attnum > 0 and not a.attisdropped
  and n.nspname not in ('pg_catalog', 'pg_toast', 'information_schema', 'consumer')
"""


async def describe(connection: Connection, name: Name) -> Table:
    """Read the definition of a table.

    Raises Misconfigured if it is gone.
    """
    row = await connection.fetchrow(_TABLE, name.schema, name.table)
    if row is None:
        raise Misconfigured(
            f"{name}: it was dropped or renamed while the rebuild ran; run it again (nothing was changed)"
        )
    oid, row_security, triggers, rules = row
    columns = [
        Column(
            name=column,
            not_null=not_null,
            default=None if generated else default,
            identity=identity,
            generated=generated,
            type_name=type_name,
            category=category,
            built_in=built_in,
            sequences=tuple(DefaultSequence(*sequence.split("\n", 1)) for sequence in sequences),
        )
        for column, not_null, default, identity, generated, type_name, category, built_in, sequences in (
            await connection.fetch(_TABLE_COLUMNS, oid)
        )
    ]
    keys = tuple(tuple(key) for (key,) in await connection.fetch(_TABLE_KEYS, oid))
    keys_and_exclusions = await constraints(connection, oid)
    return Table(
        name, oid, tuple(columns), keys, tuple(keys_and_exclusions), tuple(triggers), row_security, tuple(rules)
    )


async def constraints(connection: Connection, oid: int) -> list[Constraint]:
    """Read the keys and exclusion constraints of a table or copy."""
    return [Constraint(*row) for row in await connection.fetch(_CONSTRAINTS, oid)]


async def all_columns(connection: Connection) -> list[ColumnName]:
    """Read the columns of all tables of the application."""
    return [(Name(schema, table), column) for schema, table, column in await connection.fetch(_ALL_COLUMNS)]
