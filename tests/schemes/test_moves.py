"""Reachability decides what is early, late or never: on any machine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.schemes.moves import Moves, MoveStanding

pytestmark = pytest.mark.unit

ORDERS = {"new": {"paid", "void"}, "paid": {"shipped", "refunded"}, "shipped": {"refunded"}, "refunded": (), "void": ()}


@st.composite
def machines(draw: Any, acyclic: bool = False) -> Moves:
    """Any machine of up to seven states, all of them starts.

    Another test has states that cannot be reached.
    """
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=7, unique=True))
    pairs = [
        (one, other)
        for one, other in itertools.product(range(len(names)), repeat=2)
        if (one < other if acyclic else one != other)
    ]
    chosen = draw(st.sets(st.sampled_from(pairs))) if pairs else set()
    moves: dict[str, set[str]] = {name: set() for name in names}
    for one, other in chosen:
        moves[names[one]].add(names[other])
    return Moves(moves, start=names)


def paths(machine: Moves) -> set[tuple[str, str]]:
    """Which state leads to which, by Warshall's algorithm.

    The code uses another one.
    """
    single_moves = {(one, other) for one, after in machine.moves.items() for other in after}
    for middle, one, other in itertools.product(machine.moves, repeat=3):
        if (one, middle) in single_moves and (middle, other) in single_moves:
            single_moves.add((one, other))
    return single_moves


BOOLEANS: st.SearchStrategy[bool] = st.booleans()


@given(machines(), st.data())
def test_a_standing_is_what_its_name_says(machine: Moves, data: st.DataObject) -> None:
    current, to = data.draw(st.sampled_from([*machine.moves])), data.draw(st.sampled_from([*machine.moves]))
    before = machine.before(to)
    is_chosen = bool(before) and data.draw(st.booleans())
    chosen = data.draw(st.sets(st.sampled_from(sorted(before)), min_size=1)) if is_chosen else None
    sources = machine.sources(to, chosen)
    assert sources == (before if chosen is None else chosen)
    leads = paths(machine)
    past = (to, current) in leads
    coming = any((current, source) in leads for source in sources)
    standing = machine.standing(current, to, sources)
    if current == to:
        assert standing is MoveStanding.THERE
    elif current in sources:
        assert standing is MoveStanding.READY
        assert to in machine.moves[current]
    elif past:
        assert standing is MoveStanding.LATE
    elif coming:
        assert standing is MoveStanding.EARLY
    else:
        assert standing is MoveStanding.NEVER


@given(machines(acyclic=True), st.data())
def test_without_cycles_nothing_is_both_early_and_late(machine: Moves, data: st.DataObject) -> None:
    current, to = data.draw(st.sampled_from([*machine.moves])), data.draw(st.sampled_from([*machine.moves]))
    standing = machine.standing(current, to, machine.before(to))
    assert (standing is MoveStanding.LATE) <= (to not in machine.after(current))
    assert (standing is MoveStanding.EARLY) == (
        to in machine.after(current) and to not in machine.moves[current] and current != to
    )


@given(machines(acyclic=True), st.data())
def test_events_of_a_walk_in_any_order_end_where_the_walk_ends(machine: Moves, data: st.DataObject) -> None:
    walk: list[str] = [data.draw(st.sampled_from([*machine.moves]))]
    while bool(machine.moves[walk[-1]]) and data.draw(BOOLEANS):
        walk.append(data.draw(st.sampled_from(sorted(machine.moves[walk[-1]]))))
    events = data.draw(st.permutations(walk[1:] + walk[1:]))
    state, held = walk[0], list(events)
    for _ in range(len(events) + 1):
        waiting, held = held, []
        for to in waiting:
            match machine.standing(state, to, machine.before(to)):
                case MoveStanding.READY:
                    assert to in machine.moves[state]
                    state = to
                case MoveStanding.EARLY:
                    held.append(to)
                case MoveStanding.THERE | MoveStanding.LATE:
                    pass
                case other:
                    pytest.fail(f"{other} for an event of the row's own walk")
    assert held == []
    assert state == walk[-1]


def test_terminal_states_are_final() -> None:
    machine = Moves(ORDERS)
    assert machine.terminal == {"refunded", "void"}
    for final, to in itertools.product(machine.terminal, machine.moves):
        assert machine.standing(final, to, machine.before(to)) in (
            MoveStanding.THERE,
            MoveStanding.LATE,
            MoveStanding.NEVER,
        )


def test_move_of_an_order_is_ready_there_early_or_late() -> None:
    machine = Moves(ORDERS)

    def standing(current: str, to: str, expected_from: Any = None) -> MoveStanding:
        return machine.standing(current, to, machine.sources(to, expected_from))

    assert standing("new", "paid") is MoveStanding.READY
    assert standing("paid", "paid") is MoveStanding.THERE
    assert standing("new", "shipped") is MoveStanding.EARLY
    assert standing("shipped", "paid") is MoveStanding.LATE
    assert standing("void", "paid") is MoveStanding.NEVER
    assert standing("refunded", "new") is MoveStanding.LATE
    assert standing("lost", "paid") is MoveStanding.UNKNOWN
    assert standing("paid", "refunded") is MoveStanding.READY
    assert standing("paid", "refunded", "shipped") is MoveStanding.EARLY  # only after it was shipped, says the caller


def test_in_a_cycle_what_may_be_late_is_not_held() -> None:
    machine = Moves({"open": ["work"], "work": ["done"], "done": ["open"]})
    assert machine.standing("open", "work", machine.before("work")) is MoveStanding.READY
    assert machine.standing("open", "done", machine.before("done")) is MoveStanding.LATE


# -- what cannot be meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moves", "start", "says"),
    [
        ({}, None, "at least one state"),
        ({"new": ["payed"], "paid": []}, None, "'payed', which has no line of its own.* Did you mean 'paid'"),
        ({"new": ["new"]}, None, "moves to itself"),
        ({"new": ["paid"], "paid": [], "void": [], "lost": []}, None, "'void', 'lost' cannot be reached from 'new'"),
        ({"new": ["paid"], "paid": []}, ["knew"], "start names 'knew', which is no state. Did you mean 'new'"),
        ({"new": []}, [], "start names no state"),
    ],
)
def test_moves_that_cannot_be_meant_are_refused(moves: Any, start: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Moves(moves, start)


@pytest.mark.parametrize("moves", [{"new": "paid", "paid": ()}, {"new": None}, {"new": [1]}, {1: []}, {"": []}])
def test_moves_of_another_type_are_refused(moves: Any) -> None:
    with pytest.raises(TypeError):
        Moves(moves)


def test_a_state_may_be_a_start_of_its_own() -> None:
    assert Moves({"new": ["done"], "imported": ["done"], "done": []}, start=["new", "imported"]).start == {
        "new",
        "imported",
    }


@pytest.mark.parametrize(
    ("to", "expected_from", "says"),
    [
        ("payed", None, "'payed' is no state. Did you mean 'paid'"),
        ("paid", "nwe", "expected_from names 'nwe', which is no state. Did you mean 'new'"),
        ("paid", "void", r"lead to 'paid' from \['new'\] only"),
        ("paid", [], "only"),
        ("new", "paid", "from nowhere only"),
    ],
)
def test_a_move_that_the_machine_does_not_have_is_refused(to: str, expected_from: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Moves(ORDERS).sources(to, expected_from)


# -- drawn --------------------------------------------------------------------------------------------------------------------


def test_the_drawing_is_mermaids() -> None:
    assert Moves({"new": ["paid", "void"], "paid": [], "void": []}).mermaid() == (
        "stateDiagram-v2\n    [*] --> new\n    new --> paid\n    new --> void\n    paid --> [*]\n    void --> [*]\n"
    )


def test_names_that_mermaid_would_not_take_have_an_alias() -> None:
    drawn = Moves({"in review": ["end"], "end": ['"so"\n--> x'], '"so"\n--> x': []}).mermaid()
    assert drawn == (
        "stateDiagram-v2\n"
        '    state "in review" as s0_\n'
        '    state "end" as s1_\n'
        '    state "#34;so#34;#10;--#62; x" as s2_\n'
        "    [*] --> s0_\n"
        "    s0_ --> s1_\n"
        "    s1_ --> s2_\n"
        "    s2_ --> [*]\n"
    )


def test_an_alias_meets_no_state_of_that_name() -> None:
    assert Moves({"no te": ["s0_"], "s0_": []}).mermaid().count("as s0_\n") == 1
    assert '    state "s0_" as s1_\n' in Moves({"no te": ["s0_"], "s0_": []}).mermaid()


@given(machines())
def test_every_move_is_drawn_once(machine: Moves) -> None:
    lines = machine.mermaid().splitlines()
    assert len(lines) == len(set(lines))
    for state, after in machine.moves.items():
        assert {f"    {state} --> {target}" for target in after} <= set(lines)
    assert len(lines) == 1 + sum(map(len, machine.moves.values())) + len(machine.start) + len(machine.terminal)
