"""What one undisturbed run stores, as the measure for runs with crashes: the rows of every table, compared as text.

Knows the catalog and rows; knows no message. Limitations: columns whose default PostgreSQL computes (sequences, times, random
values) are left out; so are the columns that a test ignores; and where no worker ever differs from another, nothing shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident

_SHOWN_MAX = 5  # rows, or columns, of one table in the text of an error

# Values that PostgreSQL makes up: identities, and defaults that move, also where a foreign key refers to them.
_COLUMNS = r"""
with columns as (
    select c.oid as of, a.attnum as number, n.nspname as schema, c.relname as table, a.attname as column, a.attidentity <> '' or (a.attgenerated = ''
               and coalesce(pg_get_expr(d.adbin, d.adrelid) ~* $1, false)) as computed
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
    where c.relkind in ('r', 'p') and not c.relispartition
      and n.nspname not in ('consumer', 'information_schema') and n.nspname !~ '^pg_'
), referring as (
    select k.conrelid as of, k.conkey[i] as number
    from pg_constraint k cross join generate_subscripts(k.conkey, 1) as i
    join columns t on t.of = k.confrelid and t.number = k.confkey[i] and t.computed
    where k.contype = 'f'
)
select *, computed or (of, number) in (select of, number from referring) as moves from columns order by schema, "table", number
"""
_MOVING = r"\m(nextval|now|\w*random\w*|\w*uuid\w*|\w+_timestamp|timeofday|current_\w+|localtime\w*|txid_current)\M"

Row: TypeAlias = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """Rows of one table: the compared columns by name, and how often each row is there."""

    columns: tuple[str, ...]
    rows: Counter[Row]


async def contents(connection: Any, ignore: Collection[str]) -> dict[str, Contents]:
    """All tables outside schema `consumer`. ignore: COLUMN, TABLE or TABLE.COLUMN. Raises Misconfigured for an unknown one."""
    columns: dict[tuple[str, str], list[str]] = {}
    unknown = set(ignore)
    for row in await connection.fetch(_COLUMNS, _MOVING):
        schema, table, column = row["schema"], row["table"], row["column"]
        whole = f"{schema}.{table}"
        names = {column, table, whole, f"{table}.{column}", f"{whole}.{column}"}
        unknown -= names
        kept = columns.setdefault((schema, table), [])
        if not row["moves"] and not names & set(ignore):
            kept.append(column)
    if unknown:
        raise Misconfigured(
            f"ignore={sorted(unknown)[0]!r}: no such table or column; write TABLE, COLUMN or TABLE.COLUMN"
        )
    found: dict[str, Contents] = {}
    for (schema, table), kept in columns.items():
        listed = ", ".join(f"{ident(each)}::text" for each in kept)
        rows = await connection.fetch(f"select {listed} from {ident(schema)}.{ident(table)}")  # noqa: S608 - by ident
        found[f"{schema}.{table}"] = Contents(tuple(kept), Counter(tuple(each) for each in rows))
    return found


def differences(measure: Mapping[str, Contents], found: Mapping[str, Contents]) -> list[str]:
    """How the tables differ from those of the undisturbed run, a line for each problem."""
    problems: list[str] = []
    for place in sorted({*measure, *found}):
        expected, actual = measure.get(place), found.get(place)
        if expected is None or actual is None:
            problems.append(f"{place}: it is there in one of the two runs only")
            continue
        missing, extra = expected.rows - actual.rows, actual.rows - expected.rows
        if not missing and not extra:
            continue
        if missing.total() != extra.total():
            problems.append(_of_rows(place, expected.columns, missing, extra))
        elif names := _differing(expected.columns, missing, extra):
            problems.append(
                f"{place}: {missing.total()} rows have other values in {', '.join(names)}. They do not follow from the message: "
                "they are random, a time, a state of the process, or depend on the batch. Take them from the message, or "
                f"leave them out: prove(ignore=[{', '.join(repr(f'{place}.{each}') for each in names)}])"
            )
        else:
            problems.append(_of_rows(place, expected.columns, missing, extra))
    return problems


def _differing(columns: tuple[str, ...], missing: Counter[Row], extra: Counter[Row]) -> list[str]:
    """The columns whose values differ, if the rows are the same without them."""
    differing = [n for n in range(len(columns)) if not _alike(missing, extra, [n])]
    kept = [n for n in range(len(columns)) if n not in differing]
    return [columns[n] for n in differing] if _alike(missing, extra, kept) else []


def _alike(missing: Counter[Row], extra: Counter[Row], kept: list[int]) -> bool:
    return _narrowed(missing, kept) == _narrowed(extra, kept)


def _narrowed(rows: Counter[Row], kept: list[int]) -> Counter[Row]:
    found: Counter[Row] = Counter()
    for row, count in rows.items():
        found[tuple(row[n] for n in kept)] += count
    return found


def _of_rows(place: str, columns: tuple[str, ...], missing: Counter[Row], extra: Counter[Row]) -> str:
    told = f"{place}: {missing.total()} rows are missing and {extra.total()} are extra"
    for word, rows in (("missing", missing), ("extra", extra)):
        for row in list(rows.elements())[:_SHOWN_MAX]:
            told += f"\n    {word}: " + ", ".join(f"{name}={value}" for name, value in zip(columns, row, strict=True))
    return told
