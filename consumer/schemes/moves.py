"""Decides which state may follow which, and whether an event is early.

Pure: decides by reachability, and draws the diagram. Limitations: does not know the state of any row, nor why an event
is early. Two events of different rounds through a cycle look alike here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from enum import Enum

_PLAIN = re.compile(r"[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?")  # an alias ends in an underscore, and meets none of these
# Words that begin something else in Mermaid's grammar.
_SPECIAL = frozenset(
    {"acctitle", "accdescr", "as", "class", "classdef", "click", "default", "direction", "end", "hide", "href", "note"}
    | {"scale", "state", "statediagram", "style"}
)


class MoveStanding(Enum):
    """How a row relates to the state that an event asks for.

    Exactly one holds.
    """

    READY = "ready"  # one move away, from a state that the caller agrees to
    THERE = "there"  # it is in that state already
    LATE = "late"  # it may have been there: the state it is in can follow
    EARLY = "early"  # it may still come to a state from which the move is allowed
    NEVER = "never"  # neither
    UNKNOWN = "unknown"  # it is in a state that the moves do not name


class Moves:
    """The moves of a state machine, closed and checked.

    moves: state -> the states that may follow it; a terminal state has none. start: the states in which rows are made;
    by default the first one named. Raises ValueError for a state that only follows and has no line of its own, one that
    follows itself (that is a repetition), and one that cannot be reached from a start; TypeError for what is no text.
    """

    def __init__(self, moves: Mapping[str, Collection[str]], start: Collection[str] | None = None) -> None:
        self.moves = {state: frozenset(_states(state, after)) for state, after in moves.items()}
        if not self.moves:
            raise ValueError("a state machine needs at least one state")
        for state, after in self.moves.items():
            if not isinstance(state, str) or not state or "\0" in state:
                raise TypeError(f"a state is text of at least one character, not {state!r}")
            for follower in sorted(after):
                self._check(
                    follower,
                    f"{state!r} moves to {follower!r}, which has no line of its own; a terminal state has none after it",
                )
            if state in after:
                raise ValueError(f"{state!r} moves to itself: that is a repetition, not a move")
        self.start = frozenset(_states("start", start) if start is not None else [next(iter(self.moves))])
        for state in sorted(self.start):
            self._check(state, f"start names {state!r}, which is no state")
        if not self.start:
            raise ValueError("start names no state")
        self._after = {state: self._closure(state) for state in self.moves}
        reached = self.start.union(*(self._after[state] for state in self.start))
        if lost := [state for state in self.moves if state not in reached]:
            raise ValueError(
                f"{', '.join(map(repr, lost))} cannot be reached from {', '.join(map(repr, sorted(self.start)))}: "
                "add a move to it, or name it in start="
            )

    @property
    def terminal(self) -> frozenset[str]:
        """The states that nothing follows."""
        return frozenset(state for state, after in self.moves.items() if not after)

    def before(self, to: str) -> frozenset[str]:
        """The states from which one move leads to `to`."""
        return frozenset(state for state, after in self.moves.items() if to in after)

    def after(self, state: str) -> frozenset[str]:
        """Return every state reachable from this one, by one move or more."""
        return self._after[state]

    def sources(self, to: str, expected_from: str | Collection[str] | None) -> frozenset[str]:
        """Return the states from which an event may lead to `to`.

        Raises ValueError if there is none.
        """
        self._check(to, f"{to!r} is no state")
        before = self.before(to)
        if expected_from is None:
            return before
        wanted = frozenset([expected_from] if isinstance(expected_from, str) else expected_from)
        for state in sorted(wanted):
            self._check(state, f"expected_from names {state!r}, which is no state")
        if not wanted <= before or not wanted:
            raise ValueError(
                f"expected_from={sorted(wanted)}: the moves lead to {to!r} from {sorted(before) or 'nowhere'} only"
            )
        return wanted

    def standing(self, current: str, to: str, sources: Collection[str]) -> MoveStanding:
        """Return how a row in `current` stands to `to`.

        sources: the states from which `to` may be reached. In a cycle a row may be both past `to` and on its way to it.
        That is LATE: held, an event of this round would be applied in the next one; late, it is reported and changes
        nothing.
        """
        if current not in self.moves:
            return MoveStanding.UNKNOWN
        if current == to:
            return MoveStanding.THERE
        if current in sources:
            return MoveStanding.READY
        if current in self._after[to]:
            return MoveStanding.LATE
        if not self._after[current].isdisjoint(sources):
            return MoveStanding.EARLY
        return MoveStanding.NEVER

    def mermaid(self) -> str:
        """Return the machine as a Mermaid ``stateDiagram-v2``.

        States whose names Mermaid does not accept have an alias.
        """
        aliases = {state: _alias(n, state) for n, state in enumerate(self.moves)}
        lines = ["stateDiagram-v2"]
        for state, alias in aliases.items():
            if alias != state:
                lines.append(f'    state "{_quoted(state)}" as {alias}')
        lines += [f"    [*] --> {aliases[state]}" for state in self.moves if state in self.start]
        for state, after in self.moves.items():
            lines += [f"    {aliases[state]} --> {aliases[target]}" for target in self.moves if target in after]
        lines += [f"    {aliases[state]} --> [*]" for state in self.moves if state in self.terminal]
        return "\n".join(lines) + "\n"

    def _closure(self, state: str) -> frozenset[str]:
        reached: set[str] = set()
        ahead = [*self.moves[state]]
        while ahead:
            following = ahead.pop()
            if following not in reached:
                reached.add(following)
                ahead += self.moves[following]
        return frozenset(reached)

    def _check(self, state: str, problem: str) -> None:
        if state not in self.moves:
            near = difflib.get_close_matches(state, self.moves, 1) if isinstance(state, str) else []
            raise ValueError(problem + (f". Did you mean {near[0]!r}?" if near else ""))


def _states(what: str, given: Collection[str]) -> Iterable[str]:
    if isinstance(given, str) or not isinstance(given, Collection):
        raise TypeError(f"the states after {what!r} are a set or list, as in {{{str(given)!r}}}")
    for state in given:
        if not isinstance(state, str):
            raise TypeError(f"a state is text, not {type(state).__name__}")
    return given


def _alias(number: int, state: str) -> str:
    return state if _PLAIN.fullmatch(state) and state.lower() not in _SPECIAL else f"s{number}_"


def _quoted(state: str) -> str:
    return "".join(
        f"#{ord(character)};" if character in '"#;<>&:' or not character.isprintable() else character
        for character in state
    )
