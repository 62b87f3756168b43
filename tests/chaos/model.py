"""The protocol in a small world, explored exhaustively.

The log of one partition holds three records: A, A again (its producer sent it twice), B. Two workers take turns in any
order; each may crash, be paused and believe that it still owns the partition (a zombie), lose it and get it back. A
transaction settles one message, in small steps: look (position, pre-check), claim, handle, commit, mark, copy the
offset. The database may fail over to a standby that lacks its newest transactions, while Kafka's offset and Redis's
marks stay; Redis may be emptied; old claims may be purged. Every reachable state is visited, breadth first, so a
counterexample is a shortest one.

Checked wherever nothing is in flight and all is read: A and B have one effect each. The rules of the real consumer can
be broken one by one (`Rules`): each broken one must lead to a wrong state. Limitations: no batches, keys, retries or
statements; the runs on real servers cover those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

LOG = ("A", "A", "B")
END = len(LOG)


@dataclass(frozen=True)
class Rules:
    """The consumer's rules; each False is a mistake named in mutants.py."""

    commit_after_work: bool = True  # M1, M2: Kafka's offset is copied from what is durable
    positions_in_database: bool = True  # a worker begins at PostgreSQL's position, which goes back with it
    mark_after_commit: bool = True  # M3
    claim_is_atomic: bool = True  # M4: a lost claim is noticed even if nothing was there when one looked
    one_transaction: bool = True  # M5: claim, effect and position together
    reads_the_tag: bool = True  # M6: a COMMIT that did nothing is not taken for done
    epoch_in_marks: bool = True  # M7
    id_from_producer: bool = True  # M8
    holds_failures: bool = True  # M9: the position does not pass a message that is not settled
    purge_below_log: bool = True  # M10: only what the log cannot deliver again is forgotten
    waits_for_commit: bool = True  # M12: a COMMIT that is cut off is unknown, and run again
    begins_at_beginning: bool = True  # M13
    knows_its_own_offset: bool = True  # Kafka's copy counts for nothing where a failover has lost the first position


class Database(NamedTuple):
    """The state of PostgreSQL.

    claims: ids. effects: how often A and B were applied. position: None before the first.
    """

    claims: frozenset[str] = frozenset()
    effects: tuple[int, int] = (0, 0)
    position: int | None = None


class Worker(NamedTuple):
    """The state of a worker.

    at: its next step. next: its position in memory. wrote: the position that it last read or wrote.
    """

    at: str = "down"  # down, idle, claim, handle, commit, mark, copy
    next: int = 0
    wrote: int = 0
    epoch: int = 0
    looked: bool = False  # M4: what was there when it looked
    claimed: bool = False


class State(NamedTuple):
    database: Database = Database()
    standby: Database = Database()  # what is left when the primary dies
    epoch: int = 0
    offset: int | None = None  # Kafka's copy
    marks: frozenset[tuple[str, int]] = frozenset()
    workers: tuple[Worker, Worker] = (Worker(), Worker())
    locks: tuple[tuple[str, int], ...] = ()  # uncommitted claims: id, worker
    owner: int = 0
    crashes: int = 0
    failovers: int = 0
    faults: int = 0  # COMMITs cut off, handlers that fail, rebalances
    purges: int = 0


class Bounds(NamedTuple):
    """How much may go wrong in one history."""

    crashes: int = 1
    failovers: int = 1
    faults: int = 1
    purges: int = 1


def id_at(offset: int, rules: Rules) -> str:
    return LOG[offset] if rules.id_from_producer else f"{LOG[offset]}{offset}"


def _applied(database: Database, offset: int) -> Database:
    a, b = database.effects
    return database._replace(effects=(a + 1, b) if LOG[offset] == "A" else (a, b + 1))


def _with(state: State, number: int, worker: Worker) -> tuple[Worker, Worker]:
    first, second = state.workers
    return (worker, second) if number == 0 else (first, worker)


def _unlocked(state: State, number: int) -> tuple[tuple[str, int], ...]:
    return tuple(lock for lock in state.locks if lock[1] != number)


def steps(state: State, rules: Rules, bounds: Bounds) -> Iterator[tuple[str, State]]:
    """Everything that may happen next, with its name."""
    for number in (0, 1):
        yield from _work(state, number, rules, bounds)
        worker = state.workers[number]
        if worker.at != "down" and state.crashes < bounds.crashes:
            down = state._replace(
                workers=_with(state, number, Worker()), locks=_unlocked(state, number), crashes=state.crashes + 1
            )
            yield f"worker {number} is killed", down
    if state.faults < bounds.faults:
        # The other worker gets the partition. This one is paused, does not notice, and goes on later.
        yield "rebalance", state._replace(owner=1 - state.owner, faults=state.faults + 1)
    if state.failovers < bounds.failovers:
        first, second = (Worker() if worker.at in ("claim", "handle", "commit") else worker for worker in state.workers)
        yield (
            "the primary dies, the standby takes over",
            state._replace(
                database=state.standby,
                epoch=state.epoch + 1,
                workers=(first, second),
                locks=(),
                failovers=state.failovers + 1,
            ),
        )
    if state.standby != state.database and state.failovers < bounds.failovers:
        yield "the standby catches up", state._replace(standby=state.database)
    if state.marks and state.faults < bounds.faults:
        yield "redis is emptied", state._replace(marks=frozenset(), faults=state.faults + 1)
    if state.database.claims and state.purges < bounds.purges:
        # The log keeps everything here, so there is nothing that a right purge may forget.
        kept = state.database.claims if rules.purge_below_log else frozenset()
        if kept != state.database.claims:
            purged = state.database._replace(claims=kept)
            yield "old claims are purged", state._replace(database=purged, standby=purged, purges=state.purges + 1)


def _work(state: State, number: int, rules: Rules, bounds: Bounds) -> Iterator[tuple[str, State]]:
    worker = state.workers[number]
    name = f"worker {number}"

    def to(changed: Worker, what: str, **more: object) -> tuple[str, State]:
        return f"{name} {what}", state._replace(workers=_with(state, number, changed), **more)  # type: ignore[arg-type]

    if worker.at == "down":
        if state.owner == number:
            begin = state.database.position if rules.positions_in_database else state.offset
            if begin is None and not rules.knows_its_own_offset:
                begin = state.offset
            if begin is None:
                begin = 0 if rules.begins_at_beginning else END
            database = state.database
            if database.position is None:
                database = database._replace(position=begin)
            yield to(Worker("idle", begin, begin, state.epoch), f"begins at {begin}", database=database)
        return
    if worker.epoch != state.epoch and worker.at == "idle":
        yield to(Worker(), "notices another epoch, and begins again")
        return
    offset = worker.next
    if worker.at == "idle":
        if offset == END:
            return
        offset_committed = {} if rules.commit_after_work else {"offset": offset + 1}
        mark = (id_at(offset, rules), worker.epoch if rules.epoch_in_marks else 0)
        if mark in state.marks:
            yield to(worker._replace(at="commit", claimed=False), f"finds a mark of {LOG[offset]}", **offset_committed)
            return
        looked = id_at(offset, rules) in state.database.claims
        yield to(
            worker._replace(at="claim", looked=looked, claimed=False),
            f"takes {LOG[offset]} at {offset}",
            **offset_committed,
        )
    elif worker.at == "claim":
        id = id_at(offset, rules)
        if any(locked == id and holder != number for locked, holder in state.locks):
            return  # it waits for the other's transaction
        there = id in state.database.claims if rules.claim_is_atomic else worker.looked
        if there:
            yield to(worker._replace(at="commit"), "loses the claim: a duplicate")
        elif rules.one_transaction:
            yield to(worker._replace(at="handle", claimed=True), "claims", locks=(*state.locks, (id, number)))
        else:
            database = state.database._replace(claims=state.database.claims | {id})
            yield to(worker._replace(at="handle", claimed=True), "claims, and commits that", database=database)
    elif worker.at == "handle":
        marks = (
            state.marks if rules.mark_after_commit else state.marks | {(id_at(offset, rules), _epoch_of(worker, rules))}
        )
        yield to(worker._replace(at="commit"), "runs the handler", marks=marks)
        if state.faults < bounds.faults:
            if not rules.holds_failures:
                yield to(
                    worker._replace(at="copy", next=offset + 1, claimed=False), "runs the handler, which fails, and goes on",
                    faults=state.faults + 1, locks=_unlocked(state, number),
                    database=state.database._replace(position=offset + 1),
                )  # fmt: skip
            elif not rules.reads_the_tag:
                done = worker._replace(at="mark", next=offset + 1, wrote=offset + 1)
                yield to(
                    done, "runs the handler, which swallows an error: COMMIT is answered with ROLLBACK",
                    faults=state.faults + 1, locks=_unlocked(state, number),
                )  # fmt: skip
            else:
                yield to(
                    worker._replace(at="idle", claimed=False), "runs the handler, which fails, and will again",
                    faults=state.faults + 1, locks=_unlocked(state, number),
                )  # fmt: skip
    elif worker.at == "commit":
        yield from _commit(state, number, worker, rules, bounds, to)
    elif worker.at == "mark":
        marks = state.marks | {(id_at(offset - 1, rules), _epoch_of(worker, rules))}
        yield to(worker._replace(at="copy", claimed=False), "marks", marks=marks)
        yield to(worker._replace(at="copy", claimed=False), "cannot mark: redis does not answer")
    elif worker.at == "copy":
        yield to(worker._replace(at="idle"), "copies the offset", offset=worker.next)
        yield to(worker._replace(at="idle"), "does not copy the offset")


def _epoch_of(worker: Worker, rules: Rules) -> int:
    return worker.epoch if rules.epoch_in_marks else 0


def _commit(
    state: State, number: int, worker: Worker, rules: Rules, bounds: Bounds, to: object
) -> Iterator[tuple[str, State]]:
    """Move the position if this worker left it there, else be fenced.

    A fenced worker reads the position again.
    """
    assert callable(to)
    offset, locks = worker.next, _unlocked(state, number)
    if rules.positions_in_database and state.database.position != worker.wrote:
        yield to(Worker(), "is fenced: the position has moved", locks=locks)
        return
    database = state.database
    if worker.claimed:
        database = _applied(database, offset)
        database = database._replace(claims=database.claims | {id_at(offset, rules)})
    database = database._replace(position=offset + 1)
    done = worker._replace(at="mark" if worker.claimed else "copy", next=offset + 1, wrote=offset + 1)
    yield to(done, "commits", database=database, locks=locks)
    if state.faults < bounds.faults:
        faults = state.faults + 1
        if rules.waits_for_commit:
            # It drops the connection and runs again from the top: the claims and the position tell.
            yield to(Worker(), "commits, and never hears of it", database=database, locks=locks, faults=faults)
            yield to(Worker(), "is cut off before its commit", locks=locks, faults=faults)
        else:
            yield to(done, "cancels its commit, and takes it for done", locks=locks, faults=faults)


def is_quiescent(state: State) -> bool:
    """Whether all workers are idle and the owner has read everything.

    In this epoch of the database, to the log's end.
    """
    owner = state.workers[state.owner]
    return (
        all(worker.at in ("down", "idle") for worker in state.workers)
        and owner.at == "idle"
        and owner.next == END
        and owner.epoch == state.epoch
        and (owner.wrote == state.database.position or state.database.position is None)
    )


class Explored(NamedTuple):
    """The result of an exploration.

    states, quiescent: their numbers. wrong: the steps to the nearest state with a loss or a double, and its effects.
    """

    states: int
    quiescent: int
    wrong: list[str] | None
    effects: tuple[int, int] | None


ONE_OF_EACH = Bounds()


def explore(rules: Rules, bounds: Bounds = ONE_OF_EACH) -> Explored:
    """Visit every state; stop at the first wrong one.

    A double is wrong at once, a loss when nothing is in flight.
    """
    first = State()
    came: dict[State, tuple[State, str] | None] = {first: None}
    todo = deque([first])
    quiescent = 0
    while todo:
        state = todo.popleft()
        rests = is_quiescent(state)
        quiescent += rests
        if max(state.database.effects) > 1 or (rests and state.database.effects != (1, 1)):
            return Explored(len(came), quiescent, _way(came, state), state.database.effects)
        for what, after in steps(state, rules, bounds):
            if after not in came:
                came[after] = (state, what)
                todo.append(after)
    return Explored(len(came), quiescent, None, None)


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    way = []
    while (step := came[state]) is not None:
        state, what = step
        way.append(what)
    return way[::-1]


MUTANT_RULES = {
    "M1, M2": Rules(commit_after_work=False, positions_in_database=False),
    "M3": Rules(mark_after_commit=False),
    "M4": Rules(claim_is_atomic=False, positions_in_database=False),
    "M5": Rules(one_transaction=False),
    "M6": Rules(reads_the_tag=False),
    "M7": Rules(epoch_in_marks=False),
    "M8": Rules(id_from_producer=False),
    "M9": Rules(holds_failures=False),
    "M10": Rules(purge_below_log=False),
    "M12": Rules(waits_for_commit=False),
    "M13": Rules(begins_at_beginning=False),
    "positions in Kafka alone": Rules(positions_in_database=False),
    "Kafka's copy where there is no position": Rules(knows_its_own_offset=False),
}


if __name__ == "__main__":
    import time

    for name, rules in {"the real rules": Rules(), **MUTANT_RULES}.items():
        begun = time.monotonic()
        result = explore(rules)
        print(name, result.states, result.quiescent, result.effects, f"{time.monotonic() - begun:.1f} s")
        for event in result.wrong or ():
            print("   ", event)
