"""Inserts one row per business key; a second insert does nothing.

Knows one INSERT. Limitations: does not know whether the existing row is the same as the one it was given, nor what else
belongs to the effect. The ledger is this scheme with the message's id as the key; use this one where the business has a
key of its own (an invoice number, an order and its line), because that also catches the same payment under two message
ids.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from consumer.core.identifiers import column_names, columns_of, ident, table_ident
from consumer.schemes.database import SUPPRESSED, Database, Misfit, checked


async def insert_once(tx: Database, table: str, row: Mapping[str, Any], conflict: str | Collection[str]) -> bool:
    """Insert a row unless its key exists; return whether it is new.

    tx: a `Tx`, or an asyncpg connection (in a transaction, if the row is a part of something). table: ``table`` or
    ``schema.table``. row: column -> value. conflict: the column or columns of the key; a unique index must be on
    exactly these. A concurrent insert of the same key is waited for, until its transaction commits or rolls back.

    Raises ValueError for an empty row, and for a key column that is not in the row or is None (for PostgreSQL every
    NULL is distinct: such a key never conflicts); Misfit for a table, column or unique index that does not exist, a
    deferrable constraint, and an insert that something suppresses (one more statement finds out, only if nothing was
    inserted).

    Limitations:

    - The existing row may differ: **one that differs and has the same key is silently not stored**. Where that can happen,
      read the row and compare.
    - Only this insert is done once, not an effect of several statements. Make the others depend on its answer, in the same
      transaction (``if await insert_once(…):``), or leave it to the ledger.
    - Once the row is deleted, its key is new again.
    - Other databases are not checked: with shards, what has one business key must have Kafka keys of one shard
      (docs/how-to/shards.md), or the row is new in each.
    """
    columns = columns_of("row", row)
    key = column_names("conflict", conflict)
    for column in key:
        if column not in row:
            raise ValueError(f"insert_once: the key column {column!r} is not in the row")
        if row[column] is None:
            raise ValueError(f"insert_once: the key column {column!r} is None, and NULL never equals NULL")
    sql = (
        f"insert into {table_ident(table)} ({', '.join(map(ident, columns))}) "  # noqa: S608 - by ident
        f"values ({', '.join(f'${n}' for n in range(1, len(columns) + 1))}) "
        f"on conflict ({', '.join(map(ident, key))}) do nothing returning true"
    )
    names_it = " and ".join(f"{ident(column)} = ${n}" for n, column in enumerate(key, 1))
    look = f"select true from {table_ident(table)} where {names_it} limit 1"  # noqa: S608 - by ident
    call = f"insert_once into {table}"
    for _ in range(2):
        # race: select and then insert would let two concurrent callers both find nothing.
        if await checked(tx.fetchval(sql, *row.values()), call):
            return True
        if await checked(tx.fetchval(look, *[row[column] for column in key]), call):
            return False
        # race: the row of this key was deleted between the two statements
    raise Misfit(
        f"{call}: no row was inserted, and none with this key can be seen: a trigger changes the key, or {SUPPRESSED}"
    )
