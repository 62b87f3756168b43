from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.core.errors import TransactionMisuse
from consumer.postgres import sql_text
from consumer.postgres.sql_text import refuse_transaction_control
from consumer.postgres.sql_tokens import first_words

pytestmark = pytest.mark.unit

CONTROL = [
    "begin",
    "begin isolation level serializable",
    "start transaction",
    "commit",
    "commit and chain",
    "commit prepared 'x'",
    "end",
    "end transaction",
    "rollback",
    "rollback to savepoint s",
    "rollback prepared 'x'",
    "abort",
    "savepoint s",
    "release s",
    "release savepoint s",
    "prepare transaction 'x'",
    "set transaction isolation level serializable",
    "discard all",
    "deallocate all",
]

# What may stand before a statement, all of it nothing to PostgreSQL.
BLANKS = [
    "",
    " ",
    "\n\t\r\f",
    ";",
    " ; ;",
    "-- a comment\n",
    "--\n",
    "-- it's\n",
    "--/*\n",
    "/* a comment */",
    "/**/",
    "/***/",
    "/*/ */",
    "/* it's */",
    '/* " */',
    "/* $a$ */",
    "/* -- */",
    "/* /* */ */",
    "/*/**/*/",
    "/* /* /* x */ ; */ commit */",
]

# Whole statements, with all that might open a quote by mistake or hide the end of one.
STATEMENTS = [
    "select 1",
    "select ''",
    "select ''''",
    "select 'it''s'",
    r"select 'C:\'",
    r"select E'\''",
    r"select e'\\'",
    r"select E'''\''",
    r"select U&'\0041'",
    r"select U&'\'",
    r"select N'a\', B'1', X'1F'",
    'select 1 as "a""b"',
    r'select 1 as "a\"',
    "select 1 as U&\"d!0061\" uescape '!'",
    "select 1 as a$b$",
    "select 1 as a$b$c, 2 as a$b$",
    "select $1, $2",
    "select $1::text || 'x'",
    "select $$it's$$",
    "select $a$ $b$ $$ ' \" $a$",
    "select $é$ ' $é$",
    "select 1/2, 3-4, 5 * -6",
    "select 2*/* */3",
    "select 1 -- '\n",
    "select 1 /* ' */",
    "select somee'\\'",
    "values (1), (2)",
    "(select 1)",
]

# Where the words are no statement of their own.
HARMLESS = [
    "select 'commit; rollback'",
    "select ''';commit;'''",
    r"select E'\'; commit; --'",
    "select $$; commit; $$",
    "select $a$ ; commit $a$",
    "select $a$ $b$; commit; $b$ $a$",
    "select $_1$;commit;$_1$",
    "select $a$ $A$; commit; $a$",
    'select 1 as "commit"',
    'select 1 as "a"";commit;"',
    "select 1 -- ; commit",
    "select 1 /* ; commit */",
    "select 1 /* /* ; */ ; commit */",
    "/* commit */ select 1",
    "-- commit\nselect 1",
    "select commit from begin",
    'select begin, "end" from rollback',
    "select commit()",
    "select rollback(1), savepoint('x')",
    "select case when a then 1 else 2 end",
    "select case when a then case b when 1 then 2 end end from t",
    "update t set v = case when v > 0 then 1 end",
    "select 1 as end",
    "insert into commit values (1)",
    "delete from release",
    "update t set commit = true, abort = false",
    "select * from committed",
    "begins",
    "select commit$a$b",
    "prepare transactional as select 1",
    "set constraints all deferred",
    "do $$ begin perform 1; end $$",
    "do language plpgsql $x$ begin if true then null; end if; end; $x$",
    "create function f() returns int language plpgsql as $f$ begin return 1; end; $f$",
    "create or replace procedure p() language plpgsql as $$ begin commit; end $$",
    "create function f() returns text language sql as 'select ''x''; select 1'",
    "create rule r as on insert to t do also (insert into u values (1); delete from v)",
    "",
    ";",
    "   ",
]


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("control", CONTROL)
def test_control_is_refused_behind_anything_that_means_nothing(control: str, blank: str) -> None:
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control(blank + control)


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("between", [";", " ; ", ";\n--x\n", ";/* /* */ */", "\n;\n;"])
def test_control_is_refused_after_another_statement(statement: str, between: str) -> None:
    refuse_transaction_control(statement)
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control(f"{statement}{between}commit")


@pytest.mark.parametrize("sql", HARMLESS)
def test_the_same_words_elsewhere_pass(sql: str) -> None:
    refuse_transaction_control(sql)


@given(
    st.lists(st.sampled_from(STATEMENTS + HARMLESS), max_size=4),
    st.sampled_from(BLANKS),
    st.sampled_from(CONTROL),
    st.sampled_from(["", ";", ";select 1", " -- done", " /* done */"]),
    st.sampled_from([str.lower, str.upper, str.title]),
)
def test_control_is_found_wherever_it_stands(
    before: list[str], blank: str, control: str, after: str, case: type[str]
) -> None:
    text = "".join(f"{statement}\n;" for statement in before)
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control(text + blank + case(control) + after)


@given(st.lists(st.tuples(st.sampled_from(BLANKS), st.sampled_from(STATEMENTS + HARMLESS)), max_size=5))
def test_any_sequence_of_harmless_statements_passes(parts: list[tuple[str, str]]) -> None:
    refuse_transaction_control("".join(f"{blank}{statement}\n;" for blank, statement in parts))


@given(st.text(alphabet="'\"$;/*-\\ \nEecommitaU&_1", max_size=40))
def test_any_text_at_all_is_judged_without_an_error_of_another_kind(sql: str) -> None:
    try:
        refuse_transaction_control(sql)
    except TransactionMisuse:
        assert any(words[0] == "commit" for words in first_words(sql))


@given(st.text(max_size=60).filter(lambda text: "'" not in text))
def test_text_inside_a_string_is_no_statement(text: str) -> None:
    assert first_words(f"select '{text};commit;{text}'") == [("select",)]


@given(st.text(max_size=60).filter(lambda text: "$t$" not in text + "$t" and not text.endswith(("$", "$t"))))
def test_text_inside_a_dollar_quote_is_no_statement(text: str) -> None:
    assert first_words(f"select $t${text};commit;{text}$t$") == [("select",)]


def test_comments_do_not_separate_statements_nor_join_words() -> None:
    assert first_words("prepare/**/transaction 'x'") == [("prepare", "transaction")]
    assert first_words("com/**/mit") == [("com", "mit")]
    assert first_words("select/*;*/1") == [("select",)]


def test_the_refusal_names_the_word_and_what_to_do_instead() -> None:
    with pytest.raises(TransactionMisuse, match=r"COMMIT in a handler.*savepoint\(\).*Reject"):
        refuse_transaction_control("/* x */ commit")


def test_refused_statement_is_refused_again() -> None:
    for _ in range(3):
        with pytest.raises(TransactionMisuse):
            refuse_transaction_control("select 1; commit")


def test_statements_built_for_each_message_do_not_grow_the_memory() -> None:
    for n in range(2 * sql_text.CHECKED_MAX):
        refuse_transaction_control(f"select {n}")
    assert refuse_transaction_control.cache_info().currsize == sql_text.CHECKED_MAX


def test_very_long_texts_take_no_longer_than_their_length() -> None:
    for part in ["'a' ", "''", "E'\\'' ", "/* */ ", '"a" ', "$a$ $a$ ", "/*", "$a$", "E'", "word ", "$"]:
        refuse_transaction_control("select " + part * 20_000)


# -- PostgreSQL reads these texts in another way than one expects (its scanner: src/backend/parser/scan.l) --------------


def test_a_line_comment_ends_at_a_carriage_return_too() -> None:
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control("select 1; -- x\rcommit")


def test_an_escape_string_goes_on_after_a_newline() -> None:
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control("select E'a'\n'\\''; commit; select ''")


def test_a_tag_of_a_dollar_quote_may_be_any_character_beyond_ascii() -> None:
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control("select $€$'$€$; commit; select ''")


def test_a_name_may_begin_with_any_character_beyond_ascii_and_hold_dollars() -> None:
    with pytest.raises(TransactionMisuse):
        refuse_transaction_control("select 1 as €$a$; commit; select 1 as €$a$")


def test_a_function_with_a_body_in_standard_sql_passes() -> None:
    refuse_transaction_control("create function f() returns int begin atomic select 1; select 2; end")


@pytest.mark.parametrize(
    "statement", ["set search_path = other", "SET LOCAL role admin", "reset all", "select 1; set session x to 1"]
)
def test_session_state_that_other_messages_would_meet_is_refused(statement: str) -> None:
    with pytest.raises(TransactionMisuse, match="other messages"):
        refuse_transaction_control(statement)


@pytest.mark.parametrize("sql", ["copy t from stdin", "select 1; COPY t (a, b)\nFROM STDIN with (format csv)"])
def test_copy_that_waits_for_rows_is_refused_with_what_works(sql: str) -> None:
    with pytest.raises(TransactionMisuse, match="copy_records_to_table"):
        refuse_transaction_control(sql)
    refuse_transaction_control("insert into log values ('copy t from stdin')")
