"""Decides which topics a handler takes, by names and by its pattern.

Pure. A pattern must match the whole name of a topic. It matches no topic whose name begins with two underscores, such as
__consumer_offsets: these belong to Kafka and its tools. A handler can name one. Limitations: which topics exist is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from consumer.core.handler_signature import Wrong
from consumer.core.suggestions import suggestion

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_INTERNAL = "__"
_FLAGS = {"MULTILINE": re.MULTILINE, "DOTALL": re.DOTALL, "LOCALE": re.LOCALE, "DEBUG": re.DEBUG}
_EXAMPLE = r'topics=re.compile(r"payments\.(eu|us)")'

Pattern = re.Pattern[str]


def check_topics(names: Sequence[object], pattern: object, wrong: Wrong) -> Pattern | None:
    """Check the topics of a handler; return the pattern.

    names: that it names. pattern: the option topics=. wrong: makes a RegistrationError of a text, which is raised.
    """
    if not names and pattern is None:
        raise wrong(f'name at least one topic: @app.handler("payments"), or give a pattern: {_EXAMPLE}')
    for name in names:
        if isinstance(name, re.Pattern):
            raise wrong(f"a pattern among the names of topics; write {_EXAMPLE}")
        if not isinstance(name, str) or not _TOPIC.fullmatch(name) or name in (".", ".."):
            raise wrong(f"topic {name!r}: 1 to 249 of the characters a-z A-Z 0-9 . _ -")
    if len(set(names)) != len(names):
        raise wrong("a topic is named twice")
    return None if pattern is None else _checked(pattern, wrong)


def _checked(pattern: object, wrong: Wrong) -> Pattern:
    """Return a pattern that can match some topic."""
    if isinstance(pattern, str):
        raise wrong(
            f'topics={pattern!r}: text; a pattern is compiled, topics=re.compile(r"{pattern}"), and names come without topics='
        )
    if not isinstance(pattern, re.Pattern):
        raise wrong(
            f'topics={pattern!r}: no compiled pattern; write {_EXAMPLE}, and names without topics=: @app.handler("payments")'
        )
    if not isinstance(pattern.pattern, str):
        raise wrong(f"topics=: a pattern of bytes, and names of topics are text; write {_EXAMPLE}")
    if useless := [name for name, flag in _FLAGS.items() if pattern.flags & flag]:
        raise wrong(f"topics=: the flag {' and '.join(useless)} means nothing for the name of a topic; leave it out")
    if pattern.pattern.lstrip("^").startswith(_INTERNAL):
        raise wrong(
            "topics=: no pattern matches topics that begin with two underscores, which belong to Kafka; name the topic instead"
        )
    if not pattern.pattern.strip("^$"):
        raise wrong(f"topics=: the pattern is empty, and matches no topic; write {_EXAMPLE}")
    return pattern


def matches(pattern: Pattern | None, topic: str) -> bool:
    """Whether a pattern matches a topic."""
    return pattern is not None and not topic.startswith(_INTERNAL) and pattern.fullmatch(topic) is not None


def refuse_own(pattern: Pattern | None, names: Iterable[str], published: Iterable[str], wrong: Wrong) -> None:
    """Refuse a pattern that matches what the App publishes.

    Its messages would come back to it. names: that the handler names, and so takes on purpose.
    """
    for topic in sorted(set(published) - set(names)):
        if matches(pattern, topic):
            raise wrong(
                f"topics= matches {topic!r}, which the App publishes to, so it would read what it writes; narrow the pattern, or "
                f'name that topic as well, if you mean it: @app.handler("{topic}", topics=…)'
            )


def text_of(pattern: Pattern) -> str:
    """Return a pattern as people write it, with its flags."""
    flags = {"i": re.IGNORECASE, "x": re.VERBOSE, "a": re.ASCII}
    letters = "".join(letter for letter, flag in flags.items() if pattern.flags & flag)
    return f"(?{letters}){pattern.pattern}" if letters else pattern.pattern


class TopicSelection:
    """The topics that handlers take, whether they exist or not.

    Made once from all names and patterns of an App.
    """

    def __init__(self, names: Iterable[str], patterns: Iterable[Pattern]) -> None:
        self.names = frozenset(names)
        self.patterns = tuple(patterns)

    def takes(self, topic: str) -> bool:
        """Whether some handler takes a topic."""
        return topic in self.names or any(matches(pattern, topic) for pattern in self.patterns)

    def suggestion(self, topic: str) -> str:
        """Return which topics are taken, to end an error."""
        if not self.patterns:
            return suggestion(topic, self.names)
        return f"it has: {self}"

    def __str__(self) -> str:
        return ", ".join(
            [*sorted(self.names), *(f"those that {text_of(pattern)} matches" for pattern in self.patterns)]
        )
