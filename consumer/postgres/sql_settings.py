"""Detects settings of the connection in handlers' SQL.

A text that changes a setting would change it for other messages too. Limitations: a function of the user's own that
calls set_config is not recognized.
"""

from __future__ import annotations

import re

from consumer.core.errors import TransactionMisuse
from consumer.postgres.sql_tokens import SKIP, after_comment, first_words

_SUSPECT = re.compile(r'set_config|pg_settings|[uU]&"|\bdo\b', re.IGNORECASE)
_SET_IN_BLOCK = re.compile(
    r"(?:\A|;|>>|\bbegin\b|\bthen\b|\belse\b|\bloop\b|\bexecute\b[\s(]*(?:format\s*\(\s*)?e?(?:'+|\$\w*\$))"
    r"(?:\s|\\[nrt])*(?:set|reset)\b(?!\s+constraints\b)",
    re.IGNORECASE,
)


def changes_setting(sql: str) -> bool:
    """Return whether a text changes a setting.

    It calls set_config, updates pg_settings, or sets one in a DO block.
    """
    if not _SUSPECT.search(sql):
        return False
    names = _Names(sql)
    if "set_config" in names.called or ("pg_settings" in names.all and "update" in names.all):
        return True
    if not any(words[0] == "do" for words in first_words(sql)):
        return False
    # A block runs its text, and maybe strings in it: only its comments are not code.
    return any("set_config" in body.lower() or _SET_IN_BLOCK.search(body) for body in names.bodies)


class _Names:
    """The names in a text, those that are called, and its blocks.

    Blocks are without their comments.
    """

    def __init__(self, sql: str) -> None:
        self.all: set[str] = set()
        self.called: set[str] = set()
        self.bodies: list[str] = []
        position, name = 0, ""
        while position < len(sql):
            if sql[position].isspace():
                position += 1
                continue
            match = SKIP.match(sql, position)
            if match is None:
                if sql[position] == "(" and name:
                    self.called.add(name)
                position, name = position + 1, ""
                continue
            token, start, position = match[0], match.end(), match.end()
            if token == "/*":
                position = after_comment(sql, position)
            elif token.startswith("--"):
                continue
            elif token[0] == "$":
                end = sql.find(token, position)
                position = len(sql) if end < 0 else end + len(token)
                self.bodies.append(_without_comments(sql[start : len(sql) if end < 0 else end]))
                name = ""
            elif "'" in token:
                # After UESCAPE it belongs to the name before, which may be called.
                name = self._escaped if name == "uescape" else ""
                self.bodies.append(_without_comments(token.replace("''", "'").strip("'eE")))
            else:
                name = self._name(token, sql[position:])
                self.all.add(name)

    def _name(self, token: str, rest: str) -> str:
        if token[0] in "uU" and token[1:3] == '&"':
            escape = re.match(r"\s*uescape\s*'(.)'", rest, re.IGNORECASE)
            sign = re.escape(escape[1] if escape else "\\")
            text = re.sub(
                f"{sign}(?:\\+([0-9a-fA-F]{{6}})|([0-9a-fA-F]{{4}}))",
                lambda match: _character(int(match[1] or match[2], 16)),
                token[3:].removesuffix('"'),
            )
            self._escaped = text
            return text
        if token[0] == '"':
            return token[1:].removesuffix('"').replace('""', '"')
        return token.lower()

    _escaped = ""


def _character(code: int) -> str:
    return chr(code) if code < 0x110000 else "?"


def _without_comments(body: str) -> str:
    """Return the text of a block with a space for each comment."""
    parts: list[str] = []
    position = 0
    while match := re.compile(r"--[^\n\r]*|/\*|'(?:[^']|'')*(?:'|\Z)").search(body, position):
        parts.append(body[position : match.start()])
        position = match.end()
        if match[0] == "/*":
            position = after_comment(body, position)
            parts.append(" ")
        elif match[0][0] == "'":
            parts.append(match[0])
        else:
            parts.append(" ")
    return "".join([*parts, body[position:]])


_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)+", re.ASCII)


def check_setting(name: object, value: object) -> None:
    """Raise TransactionMisuse for a setting that tx.set_local does not take."""
    if not isinstance(name, str) or not _SETTING.fullmatch(name) or len(name) > 63:
        raise TransactionMisuse(
            'set_local: the name is not one of an application\'s own settings; write two words with a dot, like "app.tenant"'
        )
    if not isinstance(value, str):
        raise TransactionMisuse(f"set_local: the value of {name} is a {type(value).__name__}; pass a str")
    if "\0" in value:
        raise TransactionMisuse(f"set_local: the value of {name} has a NUL character; PostgreSQL's text has none")
