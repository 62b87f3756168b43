"""Words of SQL texts: skips comments, quoted text and dollar quotes.

Knows SQL's quoting rules; not a parser.
"""

from __future__ import annotations

import re

# Classes name what cannot be in them: a class up to the last character takes 8 ms to compile, at each start.
SKIP = re.compile(
    r"""
      --[^\n\r]*                            # comment to the end of the line
    | /\*                                   # block comment: nests, closed by hand below
    | [eE]'(?:[^'\\]|''|\\.)*(?:'|\Z)       # escape string; goes on after a newline
      (?:\s*[\n\r]\s*'(?:[^'\\]|''|\\.)*(?:'|\Z))*
    | '(?:[^']|'')*(?:'|\Z)                 # string
    | [uU]&"(?:[^"]|"")*(?:"|\Z)            # quoted name with escapes
    | "(?:[^"]|"")*(?:"|\Z)                 # quoted name
    | \$(?:[^\0-@\[-^`{-\x7f][^\0-/:-@\[-^`{-\x7f]*)?\$   # dollar quote: closed by hand below
    | [^\0-@\[-^`{-\x7f][^\0-#%-/:-@\[-^`{-\x7f]*         # word: letters, _, what is beyond ASCII; then also digits and $
    | ;
    """,
    re.VERBOSE | re.DOTALL,
)


def first_words(sql: str) -> list[tuple[str, ...]]:
    """Return the first two words of each statement, in lower case.

    Statements in the body of a function are left out.
    """
    statements: list[tuple[str, ...]] = []
    words: tuple[str, ...] = ()
    word, depth = "", 0  # the word before; how deep in `begin atomic … end`, where CASE has an END of its own
    position = 0
    while match := SKIP.search(sql, position):
        token, position = match[0], match.end()
        if token == "/*":
            position = after_comment(sql, position)
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


def after_comment(sql: str, position: int) -> int:
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
