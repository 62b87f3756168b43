"""Statements of SQLAlchemy's Core as SQL and arguments, for `Tx.defer`.

Each shape of a statement is compiled once. Limitations: defaults that need a query, and values that are SQL of another
statement, run as PostgreSQL sees them; nothing is returned.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine.interfaces import BindTyping
from sqlalchemy.sql.dml import Insert, UpdateBase
from sqlalchemy.util import LRUCache

from consumer.core.errors import TransactionMisuse
from consumer.deferred_writes.writer import PLAIN
from consumer.ext.sqlalchemy_dialect import TxDialect

_SHAPES_MAX = 500
_NOT_A_WRITE = "tx.defer: {} is no write; give an insert(), update() or delete() of SQLAlchemy, or SQL as text"


class _DeferredDialect(TxDialect):
    """Renders plain parameters, without casts: such statements can be sent as arrays."""

    supports_statement_cache = True
    bind_typing = BindTyping.NONE


_dialect = _DeferredDialect()  # type: ignore[no-untyped-call]
_shapes: Any = LRUCache(_SHAPES_MAX)


def compiled(statement: Any) -> tuple[str, tuple[Any, ...]]:
    """Return the SQL of a write, and its arguments.

    Raises TransactionMisuse for what is no write, and what SQLAlchemy raises for one that cannot be compiled.
    """
    if not isinstance(statement, UpdateBase):
        raise TransactionMisuse(_NOT_A_WRITE.format(type(statement).__name__))
    if isinstance(statement, Insert):
        statement = statement.inline()  # nothing is returned
    key = statement._generate_cache_key()
    shape = None if key is None else _shapes.get(key.key)
    if shape is None:
        shape = statement._compiler(_dialect, cache_key=key, column_keys=[])
        if key is not None:
            _shapes[key.key] = shape
    values = shape.construct_params(extracted_parameters=None if key is None else key.bindparams)
    for column in (*shape.insert_prefetch, *shape.update_prefetch):
        values[shape._within_exec_param_key_getter(column)] = _default(column, bool(shape.insert_prefetch))
    sql, places, processors = shape.string, shape.positiontup, shape._bind_processors
    if shape.literal_execute_params or shape.post_compile_params:
        expanded = shape._process_parameters_for_postcompile(values)
        sql, places, processors = expanded.statement, expanded.positiontup, {**processors, **expanded.processors}
        values = {**values, **expanded.additional_parameters}
    arguments = (processors[name](values[name]) if name in processors else values[name] for name in places)
    return sql + PLAIN, tuple(arguments)


def _default(column: Any, inserts: bool) -> Any:
    """Return the value of a column's default or onupdate."""
    default = column.default if inserts else column.onupdate
    if default.is_scalar:
        return default.arg
    if default.is_callable:
        return default.arg(None)
    raise TransactionMisuse(
        f"tx.defer: the default of column {column.name!r} needs a query; give the value, or use server_default"
    )
