"""SQL that finds the messages behind a difference.

Pure. Every name is quoted by `ident`.
"""

# ruff: noqa: S608 - every name in the SQL of this file is quoted by `ident`

from __future__ import annotations

from consumer.core.identifiers import ident
from consumer.rebuild.compare_sql import TableComparison, row_mark
from consumer.rebuild.table_model import literal

SOUGHT = (
    "create temp table consumer_sought (place int4 not null, mark text not null, deltas jsonb not null, "
    "primary key (place, mark))",
    "create temp table consumer_touched (place int4 not null, mark text not null, explains bool not null)",
)


def tracing(place: int, comparison: TableComparison) -> list[str]:
    """Return SQL for a trigger that notes changes of traced rows.

    It notes too whether the change of a number is exactly the difference. place: index of the table.
    """
    name, copy = f"pg_temp.consumer_touch_{place}", comparison.table.name.copy

    def mark(of: str) -> str:
        return row_mark(f"{of}.{ident(column)}" for column in comparison.marked)

    explains = " or ".join(
        f"abs(cast(s.deltas ->> {literal(column)} as numeric)) = "
        f"abs(coalesce(new.{ident(column)}, 0)::numeric - coalesce(old.{ident(column)}, 0)::numeric)"
        for column in comparison.numeric
    )
    body = f"""
declare
    before text := case when tg_op <> 'INSERT' then {mark("old")} end;
    after text := case when tg_op <> 'DELETE' then {mark("new")} end;
begin
    insert into pg_temp.consumer_touched select s.place, s.mark, coalesce({explains or "false"}, false)
    from pg_temp.consumer_sought s where s.place = {place} and s.mark in (before, after);
    return null;
end"""
    return [
        f"create function {name}() returns trigger language plpgsql as {literal(body)}",
        f"create trigger consumer_touch after insert or update or delete on {copy} for each row execute function {name}()",
    ]
