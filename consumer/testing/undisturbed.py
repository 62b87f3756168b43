"""What one undisturbed run stores: the measure for runs with crashes.

Compares the rows of every table as text. Knows the catalog and rows; knows no message. Limitations: columns whose default PostgreSQL computes (sequences, times, random
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
    """Rows of one table: the compared columns, and how often each occurs."""

    columns: tuple[str, ...]
    rows: Counter[Row]


async def contents(connection: Any, ignore: Collection[str]) -> dict[str, Contents]:
    """Read all tables outside schema `consumer`.

    ignore: COLUMN, TABLE or TABLE.COLUMN. Raises Misconfigured for an unknown one.
    """
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
    tables: dict[str, Contents] = {}
    for (schema, table), kept in columns.items():
        listed = ", ".join(f"{ident(column)}::text" for column in kept)
        rows = await connection.fetch(f"select {listed} from {ident(schema)}.{ident(table)}")  # noqa: S608 - by ident
        tables[f"{schema}.{table}"] = Contents(tuple(kept), Counter(tuple(row) for row in rows))
    return tables


def differences(measure: Mapping[str, Contents], others: Mapping[str, Contents]) -> list[str]:
    """Compare tables with the undisturbed run; return a line per problem."""
    problems: list[str] = []
    for place in sorted({*measure, *others}):
        expected, stored = measure.get(place), others.get(place)
        if expected is None or stored is None:
            problems.append(f"{place}: it is there in one of the two runs only")
            continue
        missing, extra = expected.rows - stored.rows, stored.rows - expected.rows
        if not missing and not extra:
            continue
        if missing.total() != extra.total():
            problems.append(_of_rows(place, expected.columns, missing, extra))
        elif names := _differing(expected.columns, missing, extra):
            problems.append(
                f"{place}: {missing.total()} rows have other values in {', '.join(names)}. They do not follow from the message: "
                "they are random, a time, a state of the process, or depend on the batch. Take them from the message, or "
                f"leave them out: prove(ignore=[{', '.join(repr(f'{place}.{column}') for column in names)}])"
            )
        else:
            problems.append(_of_rows(place, expected.columns, missing, extra))
    return problems


def _differing(columns: tuple[str, ...], missing: Counter[Row], extra: Counter[Row]) -> list[str]:
    """Return the columns that differ, if all others are the same."""
    differing = [n for n in range(len(columns)) if not _alike(missing, extra, [n])]
    kept = [n for n in range(len(columns)) if n not in differing]
    return [columns[n] for n in differing] if _alike(missing, extra, kept) else []


def _alike(missing: Counter[Row], extra: Counter[Row], kept: list[int]) -> bool:
    return _narrowed(missing, kept) == _narrowed(extra, kept)


def _narrowed(rows: Counter[Row], kept: list[int]) -> Counter[Row]:
    counts: Counter[Row] = Counter()
    for row, count in rows.items():
        counts[tuple(row[n] for n in kept)] += count
    return counts


def _of_rows(place: str, columns: tuple[str, ...], missing: Counter[Row], extra: Counter[Row]) -> str:
    text = f"{place}: {missing.total()} rows are missing and {extra.total()} are extra"
    for word, rows in (("missing", missing), ("extra", extra)):
        for row in list(rows.elements())[:_SHOWN_MAX]:
            text += f"\n    {word}: " + ", ".join(f"{name}={value}" for name, value in zip(columns, row, strict=True))
    return text
