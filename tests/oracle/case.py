"""A case: tables, handlers and messages as plain data.

It prints as Python that can be pasted into a test. A handler is a list of steps. An argument of a step names a field of
the message or a variable of an earlier step; "a+b" is their sum. Naming conventions say what the comparison does with a
column: names ending in `_at` or `_rnd` are left out, since clocks and random numbers differ between two runs; names
beginning with `sid` or `nid` and a digit hold values of one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from oracle.values import shown


class Shown:
    """A dataclass whose repr leaves out fields that have their default."""

    def __repr__(self) -> str:
        shown = []
        for member in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, member.name)
            default = member.default_factory() if member.default_factory is not dataclasses.MISSING else member.default
            if default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != default or type(value) is not type(default):
                shown.append(f"{member.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Step(Shown):
    """One thing that a handler does."""

    @property
    def inner(self) -> tuple[Step, ...]:
        """The steps inside this one."""
        return ()


@dataclass(frozen=True, repr=False)
class Defer(Step):
    """`tx.defer(sql, *args)`."""

    sql: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Execute(Step):
    """`await tx.execute(sql, *args)`."""

    sql: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class FetchVal(Step):
    """`variable = await tx.fetchval(sql, *args)`."""

    variable: str
    sql: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Many(Step):
    """`await tx.executemany(sql, [each row of arguments])`."""

    sql: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, repr=False)
class Copy(Step):
    """`await tx.copy_records_to_table(table, columns=…, records=[each row of arguments])`."""

    table: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, repr=False)
class Savepoint(Step):
    """`async with tx.savepoint()`.

    fails: the body raises at its end. The handler swallows that, and errors of its statements.
    """

    steps: tuple[Step, ...]
    fails: bool = False

    @property
    def inner(self) -> tuple[Step, ...]:
        return self.steps


@dataclass(frozen=True, repr=False)
class IfNone(Step):
    """`if variable is None: steps; else: otherwise`."""

    variable: str
    steps: tuple[Step, ...] = ()
    otherwise: tuple[Step, ...] = ()

    @property
    def inner(self) -> tuple[Step, ...]:
        return (*self.steps, *self.otherwise)


@dataclass(frozen=True, repr=False)
class Boom(Step):
    """Raise where the message's field `boom` says so.

    "raise" for an error, "reject" for a Reject.
    """


@dataclass(frozen=True, repr=False)
class Wait(Step):
    """Wait for something that is not the database.

    Other messages may run meanwhile, for so many turns of the event loop.
    """

    turns: int = 1


@dataclass(frozen=True, repr=False)
class Gather(Step):
    """A token works once, for its owner, and becomes a message id.

    On a real Valkey.
    """

    steps: tuple[Step, ...]

    @property
    def inner(self) -> tuple[Step, ...]:
        return self.steps


@dataclass(frozen=True, repr=False)
class SetLocal(Step):
    """`await tx.set_local(name, argument)`."""

    name: str
    arg: str


@dataclass(frozen=True, repr=False)
class Publish(Step):
    """`tx.publish(topic, [arguments as text], key=…)`.

    In a batch handler its message is the cause.
    """

    topic: str
    args: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, repr=False)
class Handler(Shown):
    """A handler of the topic.

    batch: the most messages of one call. many: the call is one `executemany` of its only step.
    """

    steps: tuple[Step, ...]
    batch: int | None = None
    many: bool = False
    concurrency: int = 1
    order: str = "key"


@dataclass(frozen=True, repr=False)
class Message(Shown):
    """A message: its Kafka key, partition and id, and handlers' fields."""

    key: str | None
    id: int
    fields: dict[str, Any]
    partition: int = 0
    payload: int | None = None  # of an id that is used again with another payload

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name!r}: {shown(value)}" for name, value in self.fields.items())
        rest = "".join(
            f", {name}={value!r}" for name, value in (("partition", self.partition), ("payload", self.payload)) if value
        )
        return f"Message({self.key!r}, {self.id}, {{{fields}}}{rest})"


@dataclass(frozen=True, repr=False)
class Table(Shown):
    """A table: its columns and constraints, and the statements that follow.

    Indexes, triggers, rules, policies, rows.
    """

    name: str
    columns: tuple[str, ...]
    extras: tuple[str, ...] = ()
    options: str = ""
    before: tuple[str, ...] = ()

    def statements(self) -> list[str]:
        return [*self.before, f"create table {self.name} ({', '.join(self.columns)}){self.options}", *self.extras]


@dataclass(frozen=True, repr=False)
class Case(Shown):
    """An application and its messages.

    batch: messages of one transaction. ddl: further statements, after the tables.
    """

    tables: tuple[Table, ...]
    handlers: tuple[Handler, ...]
    messages: tuple[Message, ...]
    batch: int = 60
    ddl: tuple[str, ...] = ()

    def schema(self) -> list[str]:
        """The statements that make its tables."""
        return [*(statement for table in self.tables for statement in table.statements()), *self.ddl]

    def steps(self) -> Iterator[Step]:
        """Every step of every handler."""
        for handler in self.handlers:
            yield from walk(handler.steps)


def walk(steps: Sequence[Step]) -> Iterator[Step]:
    """Steps and those inside them."""
    for step in steps:
        yield step
        yield from walk(step.inner)


def arguments_of(step: Step) -> list[str]:
    """The names that a step's own arguments use."""
    match step:
        case Defer(args=args) | Execute(args=args) | FetchVal(args=args):
            texts = list(args)
        case Many(rows=rows) | Copy(rows=rows):
            texts = [text for row in rows for text in row]
        case SetLocal(arg=arg):
            texts = [arg]
        case Publish(args=args, key=key):
            texts = [*args, *([key] if key else [])]
        case _:
            texts = []
    return [name for text in texts for name in text.split("+")]


@dataclass
class Difference:
    """What is wrong with a case.

    kind: table, outcome, published, crash or hang.
    """

    kind: str
    text: str
    details: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{self.kind}: {self.text}", *(f"  {detail}" for detail in self.details)])


def pasted(case: Case, difference: Difference) -> str:
    """The case as a test."""
    lines = ["async def test_counterexample(oracle: Oracle) -> None:"]
    lines += [f"    # {line}" for line in str(difference).splitlines()[:12]]
    lines.append("    await oracle.expect_equal(Case(")
    for name, values in (("tables", case.tables), ("handlers", case.handlers), ("messages", case.messages)):
        lines += [f"        {name}=(", *(f"            {value!r}," for value in values), "        ),"]
    if case.ddl:
        lines += ["        ddl=(", *(f"            {statement!r}," for statement in case.ddl), "        ),"]
    lines += [f"        batch={case.batch},", "    ))"]
    return "\n".join(lines)
