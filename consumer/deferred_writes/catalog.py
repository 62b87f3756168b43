"""What a statement may touch, judged by PostgreSQL's catalog.

Decides which statements commute, and which may run once for many rows.

`FACTS` asks PostgreSQL about the table behind a statement; `judge` decides with its answer. Two statements commute when
what they touch has nothing in common. A statement that is not proved to commute is a *barrier*: it keeps its place in the
order of the messages. Knows SQL, types and names; knows no connection.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from consumer.deferred_writes.rounds import INT_MAX, are_keys
from consumer.deferred_writes.statement_reader import FUNCTIONS, SIGNS, TYPES
from consumer.deferred_writes.statement_shape import Shape


class NotBatchedReason(Enum):
    """Why a statement is a barrier, or is not sent as arrays."""

    GRAMMAR = "it is not one of the forms that are understood"
    TABLE = "there is no table of that name"
    KIND = "it does not write to a plain or partitioned table"
    INHERITED = "its table has child tables"
    RULE = "its table has a rule"
    POLICY = "row-level security applies to its table"
    TRIGGER = "its table has a trigger for it"
    DOMAIN = "a column of its table is of a domain"
    FUNCTION = "a default, constraint or index of its table calls a function that is not known to be harmless"
    DEFERRED = "a constraint of its table is deferred to the end of the transaction"
    ACTION = "a foreign key to its table changes other rows"
    COLUMN = "it mentions a column that the table lacks, or whose type is not built in"
    SHADOWED = "a function, operator or cast of the user's own may stand for a built-in one"
    PREPARE = "PostgreSQL cannot prepare it"
    TYPE = "a parameter is of a type that is not sent as arrays"
    KEY = "its key is not of a type whose equality is known"
    UNIQUE = "it changes or adds columns of another unique or exclusion constraint"
    SELF = "its table references itself"
    SEQUENCE = "its order would decide who gets which number of a sequence, or the earlier time"
    ROWS = "its parameters cannot be taken from rows"
    MANY = "too many different statements were deferred together"


# $1 the table as written, $2 the bits of pg_trigger.tgtype for what the statement does, $3 the columns that an UPDATE or an
# upsert changes, null for none, $4 those added to, $5 the names of the functions that it calls, $6 whether it inserts,
# $7 whether it deletes, $8 the signs of operators. Partitions count as the table; children by inheritance refuse it.
FACTS = """
with root as (select to_regclass($1)::oid as oid),
tree as (select oid from root where oid is not null
         union select p.relid::oid from root, pg_partition_tree(root.oid) p),
self as (select array_agg(oid) as oids from tree),
foreign_keys as (select f.* from pg_constraint f, self where f.contype = 'f'
                 and (f.conrelid = any(self.oids) or f.confrelid = any(self.oids)))
select root.oid as relation, self.oids as tree,
       (select bool_and(c.relkind in ('r', 'p')) from pg_class c where c.oid = any(self.oids)) as tables,
       (select bool_or(c.relkind = 'r' and c.relhassubclass) from pg_class c where c.oid = any(self.oids)) as inherited,
       (select bool_or(c.relhasrules) from pg_class c where c.oid = any(self.oids)) as ruled,
       (select bool_or(row_security_active(c.oid)) from pg_class c where c.oid = any(self.oids)) as secured,
       -- A trigger for an update of other columns does not fire. One of a generated column may.
       exists (select from pg_trigger t where t.tgrelid = any(self.oids) and not t.tgisinternal
               and (cardinality(self.oids) > 1 or t.tgtype & $2 <> 0 and not (
                   t.tgtype & $2 = 16 and t.tgattr::text <> ''
                   and not exists (select from pg_attribute a where a.attrelid = t.tgrelid
                                   and a.attnum = any(t.tgattr::int2[])
                                   and (a.attgenerated <> '' or a.attname = any($3::text[]))))))
       as triggered,
       exists (select from pg_attribute a join pg_type t on t.oid = a.atttypid where a.attrelid = any(self.oids)
               and a.attnum > 0 and not a.attisdropped and t.typtype = 'd') as domains,
       exists (select from pg_depend d
               left join pg_type t on d.refclassid = 'pg_type'::regclass and d.objsubid = 0 and t.oid = d.refobjid
               left join pg_type e on e.oid = t.typelem
               where (d.refclassid in ('pg_proc'::regclass, 'pg_operator'::regclass)
                      or t.typtype not in ('b', 'e') or e.typtype not in ('b', 'e'))
               and d.refobjid >= 16384 and (d.classid, d.objid) in (
                   select 'pg_attrdef'::regclass::oid, oid from pg_attrdef where adrelid = any(self.oids)
                   union all select 'pg_constraint'::regclass::oid, oid from pg_constraint where conrelid = any(self.oids)
                   union all select 'pg_class'::regclass::oid, indexrelid from pg_index where indrelid = any(self.oids)
                   union all select 'pg_class'::regclass::oid, unnest(self.oids)))
       as functions,
       array(select pg_get_expr(e.adbin, e.adrelid) from pg_attrdef e
             join pg_attribute a on a.attrelid = e.adrelid and a.attnum = e.adnum
             where e.adrelid = any(self.oids) and a.attgenerated = '' and $6
             union all select pg_get_constraintdef(oid) from pg_constraint
             where conrelid = any(self.oids) and contype = 'c') as expressions,
       exists (select from pg_constraint k where k.condeferred
               and (k.conrelid = any(self.oids) or k.confrelid = any(self.oids))) as deferred,
       exists (select from foreign_keys f where f.confrelid = any(self.oids)
               and ($7 and f.confdeltype not in ('a', 'r')
                    or f.confupdtype not in ('a', 'r') and exists (
                        select from pg_attribute a where a.attrelid = f.confrelid and a.attnum = any(f.confkey)
                        and (a.attname = any($3) or a.attgenerated <> '')))) as acts,
       exists (select from foreign_keys f where f.conrelid = any(self.oids) and f.confrelid = any(self.oids)) as selfish,
       array(select f.oid from foreign_keys f
             cross join lateral (values (f.conrelid, f.conkey), (f.confrelid, f.confkey)) as side(relation, columns)
             where side.relation = any(self.oids)
             and ($6 or $7 or exists (select from pg_attribute a where a.attrelid = side.relation
                                      and a.attnum = any(side.columns)
                                      and (a.attname = any($3) or a.attgenerated <> '')))
             union
             select d.refobjid from pg_depend d join pg_attrdef e on d.classid = 'pg_attrdef'::regclass and d.objid = e.oid
             join pg_class s on d.refclassid = 'pg_class'::regclass and d.refobjid = s.oid and s.relkind = 'S'
             where e.adrelid = any(self.oids) and $6
             union
             select s.oid from pg_depend d join pg_class s on s.oid = d.objid and s.relkind = 'S'
             where d.classid = 'pg_class'::regclass and d.refclassid = 'pg_class'::regclass and d.deptype = 'i'
             and d.refobjid = any(self.oids) and $6) as others,
       $6 and (exists (select from pg_attribute a where a.attrelid = any(self.oids) and a.attidentity <> '')
               or exists (select from pg_depend d join pg_attrdef e on d.classid = 'pg_attrdef'::regclass and d.objid = e.oid
                          join pg_class s on d.refclassid = 'pg_class'::regclass and d.refobjid = s.oid
                          and s.relkind = 'S' where e.adrelid = any(self.oids))) as numbered,
       (select json_agg(json_build_object(
            'name', a.attname, 'type', t.typname, 'modifier', a.atttypmod,
            'builtin', t.typnamespace = 'pg_catalog'::regnamespace or t.typtype = 'e',
            'base', t.typtype in ('b', 'e') and coalesce(e.typtype in ('b', 'e'), true),
            'generated', a.attgenerated <> '', 'bytewise', a.attcollation = 0 or l.collisdeterministic) order by a.attnum)
        from pg_attribute a join pg_type t on t.oid = a.atttypid left join pg_collation l on l.oid = a.attcollation
        left join pg_type e on e.oid = t.typelem and t.typcategory = 'A'
        where a.attrelid = root.oid and a.attnum > 0 and not a.attisdropped)::text as columns,
       (select coalesce(json_agg(json_build_object(
            'columns', array(select a.attname from pg_attribute a where a.attrelid = i.indrelid and a.attnum = any(i.indkey)),
            'plain', i.indexprs is null and i.indpred is null and not i.indisexclusion,
            'bytewise', not exists (select from pg_collation l where l.oid = any(i.indcollation) and not l.collisdeterministic)
            and not exists (select from unnest(i.indclass) k(oid) where k.oid >= 16384))), '[]')
        from pg_index i where i.indrelid = any(self.oids) and (i.indisunique or i.indisexclusion))::text as uniques,
       coalesce((select bool_and(t.typname in ('int2', 'int4', 'int8') and t.typnamespace = 'pg_catalog'::regnamespace)
                 from unnest($4::text[]) as k(name)
                 left join pg_attribute a on a.attrelid = root.oid and a.attname = k.name and a.attnum > 0
                 and not a.attisdropped
                 left join pg_type t on t.oid = a.atttypid), false)
       and current_setting('wal_level') <> 'logical'
       and not exists (select from pg_constraint where conrelid = any(self.oids) and contype = 'c')
       and not exists (select from pg_attribute where attrelid = any(self.oids) and attgenerated <> '')
       and not exists (select from pg_index i where i.indrelid = any(self.oids)
                       and (i.indexprs is not null or i.indpred is not null))
       and not exists (select from unnest(self.oids) each(oid), pg_partition_ancestors(each.oid) p
                       join pg_partitioned_table k on k.partrelid = p.relid
                       left join pg_attribute a on a.attrelid = k.partrelid and a.attnum = any(k.partattrs)
                       where 0 = any(k.partattrs) or a.attname = any($4)) as addable,
       position('pg_catalog' in current_setting('search_path')) > 0
       or exists (select from pg_proc where proname = any($5) and pronamespace <> 'pg_catalog'::regnamespace)
       or exists (select from pg_operator o where o.oid >= 16384 and o.oprname = any($8)
                  and not exists (select from pg_type t where t.oid in (o.oprleft, o.oprright)
                                  and t.oid >= 16384 and t.typtype <> 'e'))
       or exists (select from pg_cast c where c.castfunc >= 16384
                  and not exists (select from pg_type t where t.oid in (c.castsource, c.casttarget)
                                  and t.oid >= 16384 and t.typtype <> 'e')) as shadowed
from root, self
"""

# Functions that defaults and constraints may call: they read no table, and no sequence but by its own name.
_IN_EXPRESSIONS = FUNCTIONS | {
    *("check", "nextval", "clock_timestamp", "random", "uuidv7", "uuidv4", "timezone", "coalesce", "greatest", "least"),
    *("nullif", "char_length", "octet_length", "btrim", "any", "all", "and", "or", "not", "in", "numeric", "varchar"),
    *("array_length", "cardinality", "jsonb_typeof", "make_interval", "to_char", "encode", "gen_random_bytes", "trim"),
    *("date_part", "extract", "jsonb_build_object", "jsonb_build_array", "upper", "isfinite", "sign", "mod", "concat"),
    *("when", "then", "else", "is", "like", "between", "varying", "character", "current_setting", "timestamp", "char"),
    *("regexp_like", "regexp_match", "split_part", "replace", "ltrim", "rtrim", "lpad", "make_date", "age", "date"),
    *(
        "jsonb_array_length",
        "jsonb_path_exists",
        "pg_input_is_valid",
        "concat_ws",
        "repeat",
        "reverse",
        "sqrt",
        "power",
    ),
    *("interval", "time", "bit", "values", "substr", "substring", "left", "right", "starts_with", "position"),
}
_CALL = re.compile(r"""'(?:[^']|'')*'(?:::regclass)?|"(?:[^"]|"")*"\s*\(?|([a-z_][a-z0-9_$.]*)\s*\(""", re.IGNORECASE)
_NEXTVAL = re.compile(r"\bnextval\((?!'(?:[^']|'')*'::regclass\))", re.IGNORECASE)
_CLOCK = re.compile(r"\b(clock_timestamp|uuidv7)\(", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Plan:
    """A statement whose effects are known.

    touches: relations, foreign keys, sequences and the clock: two plans commute when they share none. relation: the
    table itself. pins: columns whose value decides alone which rows it reads and writes, with the parameter and the
    type of each; two executions with different values commute. types: of the parameters. rows: whether many executions
    may be one, else `why`. sums: whether additions to one row may be one.
    """

    shape: Shape
    relation: int
    touches: frozenset[Hashable]
    pins: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    types: Sequence[str] = ()
    rows: bool = False
    sums: bool = False
    why: NotBatchedReason | None = None


class _Column(msgspec.Struct):
    name: str
    type: str
    modifier: int
    builtin: bool
    base: bool
    generated: bool
    bytewise: bool


class _Unique(msgspec.Struct):
    columns: list[str]
    plain: bool
    bytewise: bool  # whether it tells the same values apart as its columns do


def question(shape: Shape) -> tuple[Any, ...]:
    """The arguments of FACTS for a statement."""
    bits = {"insert": 4, "delete": 8, "update": 16, "upsert": 4 | 16}[shape.kind]
    inserts, deletes = shape.kind in ("insert", "upsert"), shape.kind == "delete"
    added = [column for column, _ in shape.added]
    return (
        shape.table,
        bits,
        list(shape.assigned) or None,
        added,
        list(shape.functions),
        inserts,
        deletes,
        sorted(SIGNS),
    )


def barrier(facts: Mapping[str, Any], shape: Shape) -> NotBatchedReason | None:
    """Return the first reason why a statement keeps its place, if any."""
    if facts["relation"] is None:
        return NotBatchedReason.TABLE
    reasons = {
        NotBatchedReason.KIND: not facts["tables"],
        NotBatchedReason.INHERITED: facts["inherited"],
        NotBatchedReason.RULE: facts["ruled"],
        NotBatchedReason.POLICY: facts["secured"],
        NotBatchedReason.TRIGGER: facts["triggered"],
        NotBatchedReason.DOMAIN: facts["domains"],
        NotBatchedReason.FUNCTION: facts["functions"] or not all(map(_is_harmless, facts["expressions"])),
        NotBatchedReason.DEFERRED: facts["deferred"],
        NotBatchedReason.ACTION: facts["acts"],
        NotBatchedReason.SHADOWED: facts["shadowed"],
    }
    for why, applies in reasons.items():
        if applies:
            return why
    columns = {column.name: column for column in _columns(facts)}
    used = {*shape.names, *shape.assigned, *(column for column, _ in shape.keys)}
    if not all(name in columns and columns[name].builtin for name in used):
        return NotBatchedReason.COLUMN
    for name, place in _inserted(facts, shape):
        # A parameter alone is of its column's own type: then nothing but that type's input has a part in it.
        if name not in columns or not (columns[name].builtin or (place is not None and columns[name].base)):
            return NotBatchedReason.COLUMN
    return None


def _inserted(facts: Mapping[str, Any], shape: Shape) -> list[tuple[str, int | None]]:
    """Return the columns that an INSERT fills, with their parameters."""
    return list(zip(shape.columns or [column.name for column in _columns(facts)], shape.inserted, strict=False))


def judge(facts: Mapping[str, Any], shape: Shape, parameters: Sequence[tuple[str, str]]) -> Plan:
    """Return the plan of a statement that is no barrier.

    parameters: schema and name of the type of each.
    """
    types = [name if schema == "pg_catalog" else "" for schema, name in parameters]
    plan = Plan(
        shape=shape,
        relation=facts["relation"],
        touches=frozenset([*facts["tree"], *facts["others"], *(["clock"] if _reads_clock(facts, shape) else [])]),
        pins=_pins(facts, shape, types),
        types=types,
        why=_why_alone(facts, shape, types),
    )
    if plan.why is not None:
        return plan
    addable = bool(shape.added) and facts["addable"] and not facts["others"]
    return Plan(
        shape,
        plan.relation,
        plan.touches,
        plan.pins,
        types,
        rows=True,
        sums=addable and all(types[place] in INT_MAX for _, place in shape.added),
    )


def _reads_clock(facts: Mapping[str, Any], shape: Shape) -> bool:
    """Whether a default shows the time, and so the order of inserts."""
    return shape.kind in ("insert", "upsert") and any(map(_CLOCK.search, facts["expressions"]))


def _why_alone(facts: Mapping[str, Any], shape: Shape, types: Sequence[str]) -> NotBatchedReason | None:
    """Why the executions of a statement cannot be one."""
    if len(types) != shape.parameters or not TYPES.issuperset(types):
        return NotBatchedReason.TYPE
    if not shape.has_rows:
        return NotBatchedReason.ROWS
    if facts["selfish"]:
        return NotBatchedReason.SELF
    columns = {column.name: column for column in _columns(facts)}
    for column, place in shape.borrowed:
        # As stored, it must be what the parameter was: no rounding, padding or cutting on the way.
        if columns[column].type != types[place] or columns[column].modifier != -1:
            return NotBatchedReason.ROWS
    if shape.kind == "insert":
        return None
    if not all(_is_key(columns[column], types[place], shape) for column, place in shape.keys):
        return NotBatchedReason.KEY
    if shape.kind == "upsert":
        if facts["numbered"] or _reads_clock(facts, shape):
            return NotBatchedReason.SEQUENCE
        [(key, _)] = shape.keys
        if any(unique.columns != [key] or not unique.plain for unique in _uniques(facts)):
            return NotBatchedReason.UNIQUE
        if not all(unique.bytewise for unique in _uniques(facts)):
            return NotBatchedReason.KEY
    elif shape.kind == "update":
        changed = _changed(facts, shape)
        if any(not unique.plain or set(unique.columns) & changed for unique in _uniques(facts)):
            return NotBatchedReason.UNIQUE
    return None


def _pins(facts: Mapping[str, Any], shape: Shape, types: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Columns whose parameter decides which rows a statement meets."""
    columns = {column.name: column for column in _columns(facts)}
    places: dict[str, int] = dict(shape.keys)
    if shape.kind == "insert":
        places = {name: place for name, place in _inserted(facts, shape) if place is not None}
    pins: dict[str, tuple[int, str]] = {}
    for name, place in places.items():
        if len(types) <= place or name not in columns or not _is_key(columns[name], types[place], shape):
            continue
        for unique in _uniques(facts) if shape.kind != "delete" else ():
            if shape.kind == "update" and unique.plain and not set(unique.columns) & _changed(facts, shape):
                continue
            if not unique.plain or not unique.bytewise or name not in unique.columns:
                break
        else:
            pins[name] = (place, columns[name].type)
    return pins


def _is_key(column: _Column, parameter: str, shape: Shape) -> bool:
    """Whether a parameter identifies rows by this column.

    A column with a length may store less than it was given.
    """
    stored = column.modifier == -1 or shape.kind in ("update", "delete")
    if column.generated and shape.kind != "delete":
        return False  # it may change with the columns that are assigned: a row may be found again under another value
    return stored and column.builtin and column.bytewise and are_keys(column.type, parameter)


def _changed(facts: Mapping[str, Any], shape: Shape) -> set[str]:
    """Return the columns that an UPDATE assigns or that are generated."""
    return {*shape.assigned, *(column.name for column in _columns(facts) if column.generated)}


def _columns(facts: Mapping[str, Any]) -> list[_Column]:
    return msgspec.json.decode(facts["columns"] or "[]", type=list[_Column])


def _uniques(facts: Mapping[str, Any]) -> list[_Unique]:
    return msgspec.json.decode(facts["uniques"], type=list[_Unique])


def _is_harmless(expression: str) -> bool:
    """Whether a default or a constraint calls known functions only.

    The text is as PostgreSQL prints it.
    """
    if _NEXTVAL.search(expression):
        return False
    for call in _CALL.finditer(expression):
        if call[0].startswith('"') and call[0].endswith("("):
            return False
        if call[1] is not None and call[1].lower().removeprefix("pg_catalog.") not in _IN_EXPRESSIONS:
            return False
    return True
