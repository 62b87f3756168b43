from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import ident
from consumer.rebuild import copy_sql, trace_sql
from consumer.rebuild.compare_sql import TableComparison, ignored_columns, match_key, named
from consumer.rebuild.copy_sql import Copier, first_rows, learned, learning, renamings
from consumer.rebuild.statement_rules import TableAccess, decide_statement, operations
from consumer.rebuild.table_model import (
    Column,
    Constraint,
    DefaultSequence,
    Name,
    Table,
    TableUsage,
    is_volatile,
    literal,
    split_statements,
)

pytestmark = pytest.mark.unit

ACCOUNTS, EFFECTS = Name("public", "accounts"), Name("public", "effects")


def table(*columns: Column, name: Name = ACCOUNTS, keys: tuple[tuple[str, ...], ...] = ()) -> Table:
    return Table(name, 1, columns, keys)


def number(name: str, **more: object) -> Column:
    return Column(name, type_name="int4", category="N", **more)  # type: ignore[arg-type]


# -- names and texts ------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=15))
def test_a_quoted_name_or_text_ends_where_it_ends(text: str) -> None:
    for quoted, quote in ((ident(text), '"'), (literal(text), "'")):
        assert quoted[0] == quoted[-1] == quote
        assert quoted[1:-1].replace(quote * 2, "") == text.replace(quote, "")
        assert quoted[1:-1].replace(quote * 2, quote) == text


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_invalid_identifier_is_refused(name: str) -> None:
    with pytest.raises(Misconfigured):
        ident(name)


def test_a_nul_can_be_no_text() -> None:
    with pytest.raises(Misconfigured):
        literal("a\0b")


WHOLE = [
    "select 1",
    "insert into t values (';')",
    "insert into t values ('it''s; so')",
    r"insert into t values (e'\'; ')",
    'insert into "a;b" values (1)',
    "select $$;$$",
    "select $a$;$$;$a$",
    "select 1 /* ; /* ; */ ; */ + 1",
    "select 1 -- ; and more\n+ 1",
    "create function f() returns int begin atomic select 1; select case when true then 1 end; end",
]


@given(st.lists(st.sampled_from(WHOLE)), st.sampled_from([";", " ;\n", "; ;", "; -- ;\n;", ";/* ; */;"]))
def test_a_text_is_taken_apart_where_its_statements_end(texts: list[str], between: str) -> None:
    assert (
        [statement.rstrip() for statement in split_statements(between.join(texts))] == texts
        or "--" in between
        or "/*" in between
    )
    parts = list(split_statements(between.join(texts)))
    assert len(parts) == len(texts)
    assert all(text in statement for text, statement in zip(texts, parts, strict=True))


@pytest.mark.parametrize("text", ["", ";", " ; ", "-- only a comment; so\n", "/* ; */"])
def test_a_text_without_a_statement_has_none(text: str) -> None:
    assert list(split_statements(text)) == []


@pytest.mark.parametrize(
    ("expression", "moves"),
    [
        ("now()", True),
        ("CURRENT_TIMESTAMP", True),
        ("(now() + '01:00:00'::interval)", True),
        ("nextval('accounts_id_seq'::regclass)", True),
        ("gen_random_uuid()", True),
        ("uuidv7()", True),
        ("uuid_generate_v4()", True),
        ("CURRENT_USER", True),
        ("date_trunc('day'::text, clock_timestamp())", True),
        ("0", False),
        ("'now()'::text", False),
        ("'it''s random()'::text", False),
        ("known()", False),
        ("NULL::timestamp without time zone", False),
    ],
)
def test_volatile_defaults_are_recognized(expression: str, moves: bool) -> None:
    assert is_volatile(expression) is moves
    assert Column("c", default=expression).has_volatile_default is moves


# -- copies ---------------------------------------------------------------------------------------------------------------


def test_copy_has_its_own_sequences_and_notes_moving_defaults() -> None:
    own = DefaultSequence("public.numbers", "numbers")
    of = table(
        number("id", identity=True, not_null=True),
        number("n", default="nextval('public.numbers'::regclass)", sequences=(own,)),
        number("m", default="(nextval('public.numbers'::regclass) + 1)", sequences=(own,)),
        Column("at", default="now()"),
        number("fixed", default="7"),
        number("twice", generated=True),
    )
    copied, counters = Copier().copy(of)
    assert copied[0].startswith('create temp table "accounts" (like "public"."accounts" including all')
    assert copied.count('create temp sequence "numbers"') == 1
    text = "\n".join(copied[1:])
    assert "public" not in text and "'pg_temp.\"numbers\"'::regclass" in text
    assert set(counters) == {"n", "m", "at"} and len(set(counters.values())) == 3
    assert '"fixed"' not in text and '"twice"' not in text and '"id"' not in text


def test_names_in_the_one_schema_of_all_copies_do_not_meet() -> None:
    copier = Copier()
    copier.copy(table(name=Name("a", "t")))
    with pytest.raises(Misconfigured, match=r"a\.t and b\.t: they have one name"):
        copier.copy(table(name=Name("b", "t")))
    for schema in ("a", "b"):
        sequence = DefaultSequence(f"{schema}.s", "s")
        column = number("n", default=f"nextval('{schema}.s'::regclass)", sequences=(sequence,))
        copied, _ = copier.copy(table(column, name=Name(schema, f"in_{schema}")))
        assert f'create temp sequence "{"s" if schema == "a" else "s_1"}"' in copied


def test_keys_of_a_copy_have_their_originals_names_even_if_crossed() -> None:
    of = Table(
        ACCOUNTS, 1, (), (), (Constraint("x", "UNIQUE (a)"), Constraint("y", "UNIQUE (b)"), Constraint("z", "U"))
    )
    constraints = [Constraint("y", "UNIQUE (a)"), Constraint("x", "UNIQUE (b)"), Constraint("z", "U")]
    steps = [
        statement.removeprefix('alter table pg_temp."accounts" rename constraint ')
        for statement in renamings(of, constraints)
    ]
    assert steps == [
        '"y" to consumer_renamed_0', '"x" to consumer_renamed_1', 'consumer_renamed_0 to "x"', 'consumer_renamed_1 to "y"',
    ]  # fmt: skip
    assert renamings(of, list(of.constraints)) == []


def test_copy_begins_with_the_rows_that_its_use_needs() -> None:
    of = table(
        number("id", not_null=True), number("balance", not_null=True, default="0"), Column("note"),
        number("twice", generated=True), number("bare", not_null=True),
    )  # fmt: skip
    assert first_rows(of, TableUsage(inserted=True), False) is None
    assert first_rows(of, TableUsage(), True) is None
    plain = first_rows(of, TableUsage(), False)
    assert plain is not None and plain.doubt is None and '"twice"' not in plain.sql
    assert plain.sql.endswith('select "id", "balance", "note", "bare" from "public"."accounts"')
    updated = first_rows(of, TableUsage(updated={"balance", "note"}), False)
    assert updated is not None and updated.doubt is None
    assert updated.sql.endswith('select "id", "bare" from "public"."accounts"')
    unknown = first_rows(of, TableUsage(updated={"bare"}), False)
    assert unknown is not None and unknown.sql == unknown.as_it_is == plain.sql
    assert (
        unknown.doubt == "public.accounts: handlers update bare, which has no default, so its first values are unknown"
    )
    whole = first_rows(table(Column("a")), TableUsage(updated={"a"}), False)
    assert whole is not None and whole.doubt is not None and "all of its columns" in whole.doubt


def test_triggers_report_only_what_is_not_known_yet() -> None:
    of = table(number("id"), number("n"), number("m"), number("twice", generated=True))
    assert learning(0, of, TableUsage(inserted=True)) == []
    sql = "\n".join(learning(3, of, TableUsage(updated={"n"})))
    assert "before insert" in sql and '"n"' not in sql and '"twice"' not in sql
    assert 'before update of "id", "m"' in sql
    assert len(learning(0, of, TableUsage(updated={"id", "n", "m"}))) == 2  # only those of an insert and a delete
    assert len(learning(0, of, TableUsage(updated={"id", "n", "m"}, deleted=True))) == 1

    known = {ACCOUNTS: TableUsage(), EFFECTS: TableUsage()}
    tables = [table(name=EFFECTS), of]
    assert learned("1 update 1 2", tables, known) == ACCOUNTS and known[ACCOUNTS] == TableUsage(False, {"n", "m"})
    assert learned("0 insert", tables, known) == EFFECTS and known[EFFECTS] == TableUsage(True, set())


# -- statements -----------------------------------------------------------------------------------------------------------


def test_plan_names_its_relations_and_what_is_done_to_them() -> None:
    scan = {"Node Type": "Seq Scan", "Relation Name": "accounts", "Schema": "pg_temp"}
    plan = [
        {
            "Plan": {
                "Node Type": "ModifyTable",
                "Operation": "Insert",
                "Relation Name": "effects",
                "Schema": "public",
                "Plans": [{"Node Type": "Nested Loop", "Plans": [scan, {**scan, "Schema": "other"}]}],
            }
        }
    ]
    assert operations(plan) == {
        EFFECTS: {"Insert"},
        Name("pg_temp", "accounts"): {"read"},
        Name("other", "accounts"): {"read"},
    }
    assert operations(None) == {}


def touch(
    name: Name, kind: str = "r", written: bool = False, inserted: bool = False, part: bool = False
) -> TableAccess:
    return TableAccess(name, kind, part, written, inserted)


VIEW, PART = Name("public", "open_accounts"), Name("public", "accounts_1")


def test_written_table_gets_a_copy_and_read_table_does_not() -> None:
    decision = decide_statement(
        [touch(ACCOUNTS, written=True), touch(EFFECTS, written=True, inserted=True), touch(VIEW, "v")], {}
    )
    assert decision == (None, {ACCOUNTS: False, EFFECTS: True})
    assert decide_statement([touch(ACCOUNTS), touch(VIEW, "v"), touch(PART, "f"), touch(PART, part=True)], {}) == (
        None,
        {},
    )
    assert decide_statement([touch(ACCOUNTS, "p", written=True)], {}).copies == {ACCOUNTS: False}


@pytest.mark.parametrize(
    ("touches", "refusal"),
    [
        ([touch(ACCOUNTS)], "names public.accounts with its schema"),
        ([touch(EFFECTS, written=True), touch(ACCOUNTS, written=True)], "names public.accounts with its schema"),
        ([touch(ACCOUNTS), touch(VIEW, "v")], "reads public.accounts through the view public.open_accounts"),
        ([touch(VIEW, "m")], "reads public.accounts through the view public.open_accounts"),
        ([touch(PART)], "names public.accounts_1, a part of public.accounts"),
        ([touch(Name("public", "v"), "v", written=True)], "writes or locks through the view public.v"),
        ([touch(Name("public", "f"), "f", written=True)], "public.f, a foreign table"),
        ([touch(Name("public", "p"), written=True, part=True)], "public.p, a part of another table"),
        ([touch(Name("consumer", "ledger"))], "consumer.ledger, which is the framework's own"),
        ([touch(Name("consumer", "ledger"), written=True)], "consumer.ledger, which is the framework's own"),
    ],
)
def test_statement_that_leaves_the_copies_is_refused(touches: list[TableAccess], refusal: str) -> None:
    decision = decide_statement(touches, {ACCOUNTS: ACCOUNTS, VIEW: ACCOUNTS, PART: ACCOUNTS})
    assert decision.refusal is not None and refusal in decision.refusal
    assert decision.copies == {}


# -- comparison -----------------------------------------------------------------------------------------------------------

COLUMNS = [(ACCOUNTS, "id"), (ACCOUNTS, "balance"), (EFFECTS, "id"), (Name("other", "accounts"), "balance")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("balance", {COLUMNS[1], COLUMNS[3]}),
        ("accounts.balance", {COLUMNS[1], COLUMNS[3]}),
        ("public.accounts.balance", {COLUMNS[1]}),
        ("effects.id", {COLUMNS[2]}),
    ],
)
def test_a_column_is_named_alone_or_with_its_table_or_with_both(text: str, expected: set[tuple[Name, str]]) -> None:
    assert named([text], "--ignore", COLUMNS) == expected


def test_a_column_that_no_table_has_is_an_error_with_names_near_it() -> None:
    assert named([], "--ignore", iter(())) == set()
    with pytest.raises(Misconfigured, match=r"--ignore acounts.balance: .* did you mean accounts\.balance"):
        named(["balance", "acounts.balance"], "--ignore", COLUMNS)
    with pytest.raises(Misconfigured, match=r"--compare zzz: no table has such a column; write"):
        named(["zzz"], "--compare", COLUMNS)


def test_columns_left_out_of_the_comparison_have_a_reason() -> None:
    of = table(
        number("id", identity=True), number("n"), Column("at", default="now()"), Column("key", default="gen_random_uuid()"),
        number("twice", generated=True), Column("seen", default="now()"), Column("stamp"), Column("x", default="x" * 99),
    )  # fmt: skip
    every = ignored_columns(of, TableUsage(True), {(ACCOUNTS, "n")}, set(), {"id", "at"}, {"stamp"})
    assert every == {
        "id": "identity", "n": "--ignore", "at": "default now()", "twice": "generated", "stamp": "written as now()",
    }  # fmt: skip
    back = {(ACCOUNTS, column) for column in ("id", "at", "twice", "stamp")}
    assert ignored_columns(of, TableUsage(True), set(), back, {"id", "at"}, {"stamp"}) == {}
    # A row that was taken over begins with a default that moves, and no message says when.
    assert ignored_columns(of, TableUsage(updated={"seen"}), set(), set(), set(), set()) == {
        "twice": "generated", "seen": "default now()",
    }  # fmt: skip
    assert len(Column("x", default="nextval" + "x" * 99).ignored_because) == 80


def test_rows_are_matched_by_the_first_key_of_which_nothing_is_left_out() -> None:
    of = table(number("id"), number("a"), number("b"), keys=(("id",), ("a", "b"), ("a",)))
    assert match_key(of, {}) == ("id",)
    assert match_key(of, {"id": "identity"}) == ("a", "b")
    assert match_key(of, {"id": "identity", "b": "--ignore"}) == ("a",)
    assert match_key(of, {"id": "identity", "a": "--ignore"}) == ()
    columns = (of.columns[1], Column("t"))
    assert TableComparison(of, ("id",), columns).marked == ("id",) and TableComparison(
        of, ("id",), columns
    ).numeric == ("a",)
    assert TableComparison(of, (), columns).marked == ("a", "t") and TableComparison(of, (), columns).numeric == ()


@pytest.mark.parametrize(
    ("column", "comparable"),
    [
        (Column("c"), True),
        (number("c"), True),
        (Column("c", type_name="uuid", category="U"), True),
        (Column("c", type_name="jsonb", category="U"), True),
        (Column("c", type_name="mood", category="E", built_in=False), True),
        (Column("c", type_name="json", category="U"), False),
        (Column("c", type_name="box", category="G"), False),
        (Column("c", type_name="_json", category="A"), False),
        (Column("c", type_name="citext", category="S", built_in=False), False),
    ],
)
def test_values_are_compared_by_type_and_otherwise_by_text(column: Column, comparable: bool) -> None:
    assert column.comparable is comparable
    comparison = TableComparison(table(number("id"), column), ("id",), (column,))
    assert ("::text is distinct from" in comparison.counts()) is not comparable
    assert ("::text as c0" in TableComparison(table(column), (), (column,)).counts()) is not comparable


def test_sql_quotes_every_name_that_comes_from_elsewhere() -> None:
    evil = "x\"; drop table y; --'"
    column = Column(evil, type_name="int4", category="N", default=None)
    of = Table(Name(evil, evil), 1, (column, Column("at", type_name="timestamptz", category="D")), ((evil,),))
    other = TableComparison(of, (evil,), (column,))
    texts = [
        *Copier().copy(of).statements,
        *renamings(Table(of.name, 1, (), (), (Constraint(evil, "U"),)), [Constraint(evil + "2", "U")]),
        *learning(0, of, TableUsage()),
        *copy_sql.compaction(of),
        *trace_sql.tracing(0, other),
        other.counts(), other.samples(), other.clock_columns() or "",
        TableComparison(of, (), (column,)).counts(), TableComparison(of, (), (column,)).samples(),
    ]  # fmt: skip
    filling = first_rows(of, TableUsage(), False)
    assert filling is not None
    for text in [*texts, filling.sql]:
        assert len(list(split_statements(text))) == 1, text
