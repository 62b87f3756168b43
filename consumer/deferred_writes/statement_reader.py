"""Read the tokens of a deferred write; refuse unknown words.

Every word of an expression is a keyword, a function or a type of the lists below, or a column. PostgreSQL resolves the
names of tables; deferred_writes/catalog.py decides about them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Depend on their arguments and the transaction only, and read no table.
FUNCTIONS = frozenset(
    {
        *("now", "gen_random_uuid", "abs", "lower", "upper", "round", "floor", "ceil", "length", "date_trunc"),
        *("md5", "to_timestamp"),
    }
)
_FUNCTION_KEYWORDS = frozenset({"coalesce", "greatest", "least", "nullif"})  # none of these can be redefined
_KEYWORDS = frozenset(
    {
        *("null", "true", "false", "current_timestamp", "current_date", "localtimestamp"),
        *("current_user", "session_user"),
    }
)
_JOINING = frozenset({"and", "or", "not", "is"})
# Words that make an expression more than one row's arithmetic, or mean something else in a SELECT than in VALUES.
_REFUSED = frozenset(
    {
        *("select", "with", "default", "returning", "from", "only", "case", "exists", "any", "all", "some", "array"),
        *("row", "in", "between", "like", "ilike", "similar", "collate", "over", "current", "overriding", "table"),
        *("tablesample", "using", "where", "values", "set", "on"),
    }
)
_TOKEN = re.compile(
    r"""[\ \t\n\r\f]+
    | (?P<parameter>\$[1-9][0-9]{0,4}(?![0-9A-Za-z_]))
    | (?P<number>[0-9]+(?:\.[0-9]+)?(?![0-9A-Za-z_.]))
    | (?P<text>'(?:[^'\\]|'')*'(?!\s*[\n\r]?\s*'))
    | (?P<quoted>"(?:[^"\\]|"")+")
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)(?!['"$]|[^\0-\x7f])
    | (?P<sign>::|[(),.]|[-+*/%=<>!|]+)
    """,
    re.VERBOSE,
)
SIGNS = frozenset({"||", "<>", "<=", ">=", "!=", "->", "->>", "-", "+", "*", "/", "%", "=", "<", ">"})
# Scalars whose arrays the driver encodes from plain Python values, and that PostgreSQL's unnest gives back unchanged.
TYPES = frozenset(
    {
        *("int2", "int4", "int8", "float4", "float8", "numeric", "bool", "uuid"),
        *("text", "varchar", "bytea", "date", "timestamp", "timestamptz", "json", "jsonb"),
    }
)
_CASTS = TYPES | {"int", "integer", "bigint", "smallint", "boolean", "decimal", "real", "interval"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str  # words in lower case, quoted names and all else as written


class NotUnderstood(Exception):
    """The statement has another form than those that are known."""


def tokenize(sql: str) -> list[Token] | None:
    if "--" in sql or "/*" in sql:
        return None
    tokens: list[Token] = []
    position = 0
    while position < len(sql):
        match = _TOKEN.match(sql, position)
        if match is None:
            return None
        position = match.end()
        kind, text = match.lastgroup, match[0]
        if kind == "sign" and text not in ("::", "(", ")", ",", "."):
            # PostgreSQL takes all signs together for one operator. But a last + or - is a number's, without a % ! or | before.
            while len(text) > 1 and text not in SIGNS and text[-1] in "+-" and not re.search("[%!|]", text):
                text, position = text[:-1], position - 1
            if text not in SIGNS:
                return None
        if kind is not None:
            tokens.append(Token(kind, text.lower() if kind == "word" else text))
    return tokens


class StatementReader:
    def __init__(self, tokens: Sequence[Token], position: int) -> None:
        self._tokens = tokens
        self._position = position
        self.parameters: set[int] = set()
        self.columns: set[str] = set()
        self.functions: set[str] = set()

    @property
    def next(self) -> Token:
        return self._tokens[self._position] if self._position < len(self._tokens) else Token("end", "")

    def take(self, *texts: str) -> Token:
        """The next token, which must be one of these."""
        token = self.next
        if texts and token.text not in texts:
            raise NotUnderstood
        self._position += 1
        return token

    def takes(self, *texts: str) -> bool:
        """Whether these come next; if so they are passed."""
        following = [token.text for token in self._tokens[self._position : self._position + len(texts)]]
        if following != list(texts):
            return False
        self._position += len(texts)
        return True

    def name(self) -> str:
        token = self.take()
        if token.kind not in ("word", "quoted") or token.text in _REFUSED:
            raise NotUnderstood
        return token.text

    def dotted(self) -> str:
        name = self.name()
        while self.takes("."):
            name += f".{self.name()}"
        return name

    def names(self) -> list[str]:
        self.take("(")
        parts = [self.name()]
        while self.takes(","):
            parts.append(self.name())
        self.take(")")
        return parts

    def expression(self, *ends: str, owners: Sequence[str]) -> list[Token]:
        """Tokens up to one of `ends` outside parentheses, parameters replaced.

        owners: what columns may be qualified with; none where an expression may not use columns.
        """
        tokens: list[Token] = []
        depth = 0
        while depth or self.next.text not in ends:
            token = self.take()
            match token.kind:
                case "end":
                    raise NotUnderstood
                case "word" | "quoted":
                    self._word(token, tokens[-1].text if tokens else "", owners)
                case "parameter":
                    number = int(token.text[1:])
                    self.parameters.add(number)
                    token = Token("parameter", f"consumer_r.consumer_c{number}")
                case _:
                    pass
            depth += (token.text == "(") - (token.text == ")")
            if depth < 0:
                raise NotUnderstood
            tokens.append(token)
        if not tokens:
            raise NotUnderstood
        return tokens

    def _word(self, token: Token, before: str, owners: Sequence[str]) -> None:
        """Record what a word names. Raises NotUnderstood for an unknown one."""
        text, after = token.text, self.next
        if token.kind == "word" and text in _REFUSED:
            raise NotUnderstood
        if token.kind == "word" and before not in (".", "::") and (text in _JOINING or text in _KEYWORDS):
            return
        if before == "::" or (token.kind == "word" and after.kind == "text"):  # a type
            if token.kind != "word" or text not in _CASTS:
                raise NotUnderstood
        elif after.text == "(":
            if token.kind != "word" or before == "." or text not in FUNCTIONS | _FUNCTION_KEYWORDS:
                raise NotUnderstood
            if text in FUNCTIONS:
                self.functions.add(text)
        elif after.text == ".":
            if before == "." or plain_name(text) not in owners:
                raise NotUnderstood
        elif owners:
            self.columns.add(plain_name(text))
        else:
            raise NotUnderstood

    def count(self) -> int:
        """How many parameters there are. They must be used without a gap."""
        if not self.parameters or self.parameters != set(range(1, len(self.parameters) + 1)):
            raise NotUnderstood
        return len(self.parameters)


def plain_name(name: str) -> str:
    """A name as the catalog holds it."""
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
