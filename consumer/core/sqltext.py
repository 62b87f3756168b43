"""Refuses SQL that would end or open a transaction. Knows SQL's quoting rules; does not know what a statement does.

Not a parser: it finds the first word of every statement of a text, skipping comments, quoted text and dollar quotes.
A COMMIT hidden in a function or a DO block needs no check here: PostgreSQL refuses it inside a transaction block (2D000).
"""

from __future__ import annotations

import re

from consumer.core.errors import TransactionMisuse

_FORBIDDEN = frozenset({"begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release", "discard"})
_CHECKED_MAX = 4096

_SKIP = re.compile(
    r"""
      --[^\n\r]*                            # comment to the end of the line
    | /\*                                   # block comment: nests, closed by hand below
    | [eE]'(?:[^'\\]|''|\\.)*(?:'|\Z)       # escape string; goes on after a newline
      (?:\s*[\n\r]\s*'(?:[^'\\]|''|\\.)*(?:'|\Z))*
    | '(?:[^']|'')*(?:'|\Z)                 # string
    | "(?:[^"]|"")*(?:"|\Z)                 # quoted name
    | \$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z_0-9\x80-\U0010ffff]*)?\$   # dollar quote: closed by hand below
    | [A-Za-z_\x80-\U0010ffff][A-Za-z_0-9$\x80-\U0010ffff]*          # word: any character beyond ASCII may be in one
    | ;
    """,
    re.VERBOSE | re.DOTALL,
)

_checked: set[str] = set()


def transaction_control(sql: str) -> str | None:
    """The first statement of `sql` that controls the transaction, by its first words in capitals."""
    for words in first_words(sql):
        if words[0] in _FORBIDDEN or words == ("prepare", "transaction") or words == ("set", "transaction"):
            return words[0].upper()
    return None


def refuse_transaction_control(sql: str) -> None:
    """Raise TransactionMisuse for SQL that controls the transaction, or changes what other messages of it would meet.

    Remembers texts it has passed.
    """
    if sql in _checked:
        return
    if word := transaction_control(sql):
        raise TransactionMisuse(
            f"{word} in a handler: the framework commits the claim and the effect together. "
            "Use tx.savepoint() for a part that may fail, or raise Reject to store nothing"
        )
    for words in first_words(sql):
        if words[0] in ("set", "reset") and words[1:] != ("constraints",):
            raise TransactionMisuse(
                f"{words[0].upper()} in a handler: the transaction and its connection are other messages' too. "
                "Give the role or the function that setting (alter role … set, create function … set)"
            )
    if len(_checked) >= _CHECKED_MAX:  # SQL built anew for each message: forget rather than grow
        _checked.clear()
    _checked.add(sql)


def first_words(sql: str) -> list[tuple[str, ...]]:
    """The first two words of each statement of `sql`, in lower case. The body of a function is no statement of it."""
    statements: list[tuple[str, ...]] = []
    words: tuple[str, ...] = ()
    word, depth = "", 0  # the word before; how deep in `begin atomic … end`, where CASE has an END of its own
    position = 0
    while found := _SKIP.search(sql, position):
        token, position = found[0], found.end()
        if token == "/*":
            position = _after_comment(sql, position)
        elif token[0] == "$":
            end = sql.find(token, position)
            position = len(sql) if end < 0 else end + len(token)
        elif token == ";":
            if not depth:
                statements += [words] if words else []
                words = ()
        elif token[0] not in "-'\"" and "'" not in token:
            before, word = word, token.lower()
            if depth:
                depth += (word == "case") - (word == "end")
            elif words[:1] == ("create",) and (before, word) == ("begin", "atomic"):
                depth = 1
            if len(words) < 2:
                words += (word,)
    return statements + ([words] if words else [])


def _after_comment(sql: str, position: int) -> int:
    depth = 1
    while depth:
        opened, closed = sql.find("/*", position), sql.find("*/", position)
        if closed < 0:
            return len(sql)
        if 0 <= opened < closed:
            depth, position = depth + 1, opened + 2
        else:
            depth, position = depth - 1, closed + 2
    return position
