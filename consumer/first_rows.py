"""What a table held before the first message, where that may explain a difference: rows that are older than the handlers.

Knows SQL through a connection that is handed in. A rebuild lets tables that handlers insert into begin empty. PostgreSQL
keeps the transaction that wrote each row (xmin), so a row that is older than all rows of the handlers in the ledger, and than
their entries in `consumer.handlers`, was made by no message. A restored dump writes all rows again: then the ledger has rows
of several transactions under one xmin, or none of the table's rows is of a transaction of the ledger, and nothing is known.
Limitations: a row that a message has updated since has lost that trace.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from consumer.core.beginnings import beginning_doubt
from consumer.core.scratch import Name

# The entries of handlers are updated (a new name, more topics), so that alone they say too little.
_LEDGER = """
select greatest(max(age(x)), (select max(age(xmin)) from consumer.handlers where handler = any($1))),
       coalesce(bool_or(first <> last), false)
from (select xmin as x, min(applied_at) as first, max(applied_at) as last
      from consumer.ledger where handler = any($1) group by xmin) l
"""


async def older_than_handlers(
    connection: Any, names: Collection[Name], handlers: Sequence[int], tables: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A reason for doubt for each of these tables that may not have begun empty. tables: what their comparison found."""
    found: list[dict[str, Any]] = []
    counts = {table["table"]: table for table in tables}
    age, restored = await connection.fetchrow(_LEDGER, list(handlers)) if names else (None, False)
    for name in names:
        older, linked = await connection.fetchrow(
            f"select count(*) filter (where age(t.xmin) > $2), "  # noqa: S608 - `real` is quoted
            f"coalesce(bool_or(t.xmin in (select l.xmin from consumer.ledger l where l.handler = any($1))), false) from {name.real} t",
            list(handlers),
            age,
        )
        if doubt := beginning_doubt(name, older, counts[str(name)], knows=linked and not restored):
            found.append(doubt)
    return found
