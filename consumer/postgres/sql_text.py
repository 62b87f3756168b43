"""Refuses SQL that would affect the transaction or later messages.

Looks at the first words of every statement of a text; does not know what a statement does. A COMMIT hidden in a
function or a DO block needs no check here: PostgreSQL refuses it inside a transaction block (2D000).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from consumer.core.errors import TransactionMisuse
from consumer.postgres.sql_settings import changes_setting
from consumer.postgres.sql_tokens import first_words

_FORBIDDEN = frozenset(
    {
        *("begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release"),
        *("discard", "deallocate"),  # they would drop the driver's prepared statements, for all later messages
    }
)
CHECKED_MAX = 4096

# Commands that change no table's definition, apart from functions that they call.
_NO_DDL = frozenset(
    {
        *(
            "select",
            "insert",
            "update",
            "delete",
            "with",
            "values",
            "merge",
            "lock",
            "notify",
            "fetch",
            "move",
            "close",
        ),
        *("declare", "explain", "table", "show", "set", "truncate"),
    }
)
_FROM_STDIN = re.compile(r"\bfrom\s+stdin\b", re.IGNORECASE)
_INSERT = re.compile(r"\b(insert|merge)\s+into\b", re.IGNORECASE)
_INTO = re.compile(r"\binto\b", re.IGNORECASE)
_TEMPORARY = re.compile(r"\btemp(orary)?\b", re.IGNORECASE)
_traits: dict[str, Traits] = {}


def transaction_control(sql: str) -> str | None:
    """Return the keyword that controls the transaction, if any."""
    for words in first_words(sql):
        if words[0] in _FORBIDDEN or words == ("prepare", "transaction") or words == ("set", "transaction"):
            return words[0].upper()
    return None


@lru_cache(CHECKED_MAX)  # bounded: a handler may build a new text for each message
def refuse_transaction_control(sql: str) -> None:
    """Raise TransactionMisuse for SQL that affects other messages.

    It controls the transaction, or changes its settings. Accepted texts are remembered.
    """
    if word := transaction_control(sql):
        raise TransactionMisuse(
            f"{word} in a handler: the framework commits the claim and the effect together; "
            "use tx.savepoint() for a part that may fail, or raise Reject to store nothing"
        )
    for words in first_words(sql):
        if words[0] in ("set", "reset") and words[1:] != ("constraints",):
            raise TransactionMisuse(
                f"{words[0].upper()} in a handler: the transaction and its connection are other messages' too; "
                "give the role or the function that setting (alter role … set, create function … set)"
            )
        if words[0] == "copy" and _FROM_STDIN.search(sql):  # the driver would wait for ever
            raise TransactionMisuse(
                "COPY FROM STDIN in a handler: its rows would never come; use await tx.copy_records_to_table(table, records=rows)"
            )
    if changes_setting(sql):
        raise TransactionMisuse(
            "set_config in a handler: the transaction and its connection are other messages' too; "
            'use await tx.set_local("app.name", value) for this message, or give the role the setting (alter role … set)'
        )


class Traits(NamedTuple):
    """What the order of a text depends on, beside what it writes.

    several: it holds more than one command, which PostgreSQL takes only without parameters. changes_schema: it may be
    DDL; functions that change the schema are not recognized. sets_constraints: SET CONSTRAINTS, makes_temporary: a
    temporary table, opens_cursor: DECLARE; these outlast their message in the transaction.
    """

    several: bool
    changes_schema: bool
    sets_constraints: bool
    makes_temporary: bool
    opens_cursor: bool

    @property
    def outlasts(self) -> bool:
        """Whether it leaves more than rows to later messages."""
        return self.changes_schema or self.sets_constraints or self.opens_cursor


def traits(sql: str) -> Traits:
    """Return the traits of a text; texts are remembered."""
    remembered = _traits.get(sql)
    if remembered is None:
        if len(_traits) >= CHECKED_MAX:
            _traits.clear()
        commands = first_words(sql)
        into = any(words[0] in ("select", "with") for words in commands) and _INTO.search(_INSERT.sub("", sql))
        changes = bool(into) or any(words[0] not in _NO_DDL for words in commands)
        remembered = _traits[sql] = Traits(
            several=len(commands) > 1,
            changes_schema=changes,
            sets_constraints=("set", "constraints") in commands,
            makes_temporary=changes and _TEMPORARY.search(sql) is not None,
            opens_cursor=any(words[0] == "declare" for words in commands),
        )
    return remembered
