"""Claims give the same answers whatever ids they expect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from harness import as_worker, migrated, settings_for, until

from consumer import App, Tx
from consumer.core.delivery import Delivery
from consumer.core.message import LogRecord
from consumer.postgres import claim_sql
from consumer.postgres.claims import REDELIVERED, Claims
from consumer.postgres.protocol import Connection
from consumer.postgres.session import CONFLICTS_CLASS, Session

TOPIC = "t"


class RecordingClaims(Claims):
    """Claims that record whether a statement looked or claimed."""

    def __init__(self, connection: Connection, begin: Callable[[], Awaitable[None]], clock_skew_hours: float) -> None:
        super().__init__(connection, begin, clock_skew_hours)
        self.asked: list[str] = []

    async def ask(self, deliveries: Sequence[Delivery], topics: Mapping[str, int], *, to_claim: bool) -> Any:
        self.asked.append("claim" if to_claim else "look")
        return await super().ask(deliveries, topics, to_claim=to_claim)


async def recorded(session: Session) -> list[str]:
    """The statements of a session's claims, from now on."""
    claims = RecordingClaims(session.connection, session.begin, 0)
    await claims.read_generations()
    claims.history = session.claims.history
    session.claims = claims
    return claims.asked


class Claimants:
    """Sessions of a worker, and claims of messages that Kafka never saw."""

    def __init__(self, dsn: str) -> None:
        self.settings = settings_for(as_worker(dsn), "127.0.0.1:1")
        self.opened: list[Session] = []
        app = App("ledger")

        @app.handler(TOPIC)
        async def settle(message: dict[str, int], tx: Tx) -> None: ...

        self.handler = app.handlers["settle"]
        self.topics: dict[str, int] = {}

    async def session(self) -> Session:
        session = await Session.open(self.settings)
        self.opened.append(session)
        numbers, self.topics = await session.numbers("ledger", ["settle"], [TOPIC])
        self.handler.number = numbers["settle"]
        return session

    def deliveries(self, ids: list[UUID], partitions: int = 1, print: int = 1) -> list[Delivery]:
        return [
            Delivery(self.handler, LogRecord(TOPIC, n % partitions, n, 0, None, b"{}", ()), id.bytes, print)
            for n, id in enumerate(ids)
        ]

    async def commit(self, session: Session, offered: list[Delivery]) -> dict[Delivery, Any]:
        await session.begin()
        existing = await session.claim(offered, self.topics)
        await session.commit()
        return existing


@pytest.fixture
async def claims(database: str) -> AsyncIterator[Claimants]:
    await migrated(database)
    claimants = Claimants(database)
    yield claimants
    for session in claimants.opened:
        session.close()


@pytest.mark.parametrize("partitions", [1, 3])
async def test_known_ids_are_looked_up_and_only_the_rest_is_claimed(claims: Claimants, partitions: int) -> None:
    session = await claims.session()
    ids = [uuid4() for _ in range(40)]
    assert await claims.commit(session, claims.deliveries(ids, partitions)) == {}
    asked = await recorded(session)
    again = claims.deliveries(ids, partitions)
    assert await claims.commit(session, again) == dict.fromkeys(again, REDELIVERED)
    assert asked == ["claim"]  # the session expected new ids
    again = claims.deliveries(ids, partitions)
    assert await claims.commit(session, again) == dict.fromkeys(again, REDELIVERED)
    assert asked == ["claim", "look"]
    mixed = claims.deliveries([*ids[:10], *[uuid4() for _ in range(30)]], partitions, print=2)
    existing = await claims.commit(session, mixed)
    assert set(existing) == set(mixed[:10]) and all(claim.clashes for claim in existing.values())
    assert asked == ["claim", "look", "look", "claim"]
    assert await claims.commit(session, claims.deliveries([uuid4() for _ in range(5)])) == {}
    assert asked[4:] == ["claim"]  # most were new
    assert await session.connection.fetchval("select count(*) from consumer.ledger") == 75


async def test_a_claim_that_is_not_committed_yet_is_waited_for_after_a_look_too(claims: Claimants) -> None:
    first, second = await claims.session(), await claims.session()
    ids = [uuid4() for _ in range(10)]
    await claims.commit(second, claims.deliveries(ids))
    await claims.commit(second, claims.deliveries(ids))  # so that it looks first
    asked = await recorded(second)
    held = uuid4()
    await first.begin()
    await first.claim(claims.deliveries([held]), claims.topics)
    waiting = asyncio.create_task(claims.commit(second, offered := claims.deliveries([*ids, held])))
    watcher = await asyncpg.connect(claims.settings.dsn)

    async def waits() -> Any:
        return await watcher.fetchval("select count(*) from pg_locks where not granted") or waiting.done()

    await until("the second one to wait", waits)
    assert not waiting.done()
    await first.commit()
    existing = await waiting
    assert set(existing) == set(offered) and not existing[offered[-1]].same_record  # the other's record, not this one
    assert asked[0] == "look" and "claim" in asked
    await watcher.close()


async def test_a_look_through_an_old_version_of_the_ledger_is_taken_again(claims: Claimants, database: str) -> None:
    """The generation that it names was dropped meanwhile."""
    session = await claims.session()
    ids = [uuid4() for _ in range(10)]
    await claims.commit(session, claims.deliveries(ids))
    await claims.commit(session, claims.deliveries(ids))
    owner = await asyncpg.connect(database)

    async def turn() -> None:
        while True:
            version = await owner.fetchval("select version from consumer.ledger_state")
            if await owner.fetchval("select consumer.turn($1)", version) == "turned":
                return

    await turn()
    kept = [uuid4() for _ in range(10)]
    other = await claims.session()
    await claims.commit(other, claims.deliveries(kept))
    await claims.commit(other, claims.deliveries(kept))
    await turn()
    for number in (1, 2):
        version = await owner.fetchval("select version from consumer.ledger_state")
        assert await owner.fetchval("select consumer.forget($1, $2)", version, number) == "forgotten"
        assert await owner.fetchval("select consumer.drop_generation($1)", number) == "dropped"
    for looking in (session, other):
        assert looking.claims.history.share_known == 1.0
        assert await claims.commit(looking, claims.deliveries([uuid4() for _ in range(3)])) == {}
    assert await owner.fetchval("select count(*) from consumer.ledger") == 6
    await owner.close()


async def expecting_session(claims: Claimants) -> Session:
    """A session whose next claim expects only new ids."""
    session = await claims.session()
    while not session.claims.history.expects_new:
        assert await claims.commit(session, claims.deliveries([uuid4() for _ in range(3)])) == {}
    return session


async def dead_rows(claims: Claimants, database: str) -> int:
    """The versions of rows in the ledger's pages that no transaction sees."""
    owner = await asyncpg.connect(database)
    await owner.execute("create extension if not exists pageinspect")
    pages = "generate_series(0, pg_relation_size('consumer.ledger') / 8192 - 1) as page"
    versions = await owner.fetchval(
        f"select count(*) from {pages}, heap_page_items(get_raw_page('consumer.ledger', page::int4)) where lp_flags = 1"
    )
    visible = await owner.fetchval("select count(*) from consumer.ledger")
    await owner.close()
    return int(versions - visible)


@pytest.mark.parametrize("partitions", [1, 3])
async def test_known_id_among_expected_new_ones_is_a_duplicate(
    claims: Claimants, database: str, partitions: int
) -> None:
    other = await claims.session()
    known = [uuid4() for _ in range(2)]
    await claims.commit(other, claims.deliveries(known, partitions))
    session = await expecting_session(claims)
    before = await session.connection.fetchval("select count(*) from consumer.ledger")
    mixed = claims.deliveries([*known, *[uuid4() for _ in range(30)]], partitions, print=2)
    existing = await claims.commit(session, mixed)
    assert set(existing) == set(mixed[:2]) and all(claim.clashes for claim in existing.values())
    assert await session.connection.fetchval("select count(*) from consumer.ledger") == before + 30
    assert not session.claims.history.expects_new  # until several claims met only new ids


async def test_claim_that_expects_new_ids_is_a_plain_insert(claims: Claimants, database: str) -> None:
    """It fails where the claim that may lose would answer."""
    session = await expecting_session(claims)
    statements = claim_sql.statements(1, False, (1,))
    asked: list[str] = []

    def note(query: Any) -> None:
        asked.append(query.query)

    session.connection.add_query_logger(note)
    assert await claims.commit(session, claims.deliveries([uuid4() for _ in range(3)])) == {}
    assert await claims.commit(session, claims.deliveries([uuid4() for _ in range(3)], 3)) == {}
    assert [text for text in asked if "insert into" in text] == [statements.claim_new_alike, statements.claim_new]


async def test_claim_of_an_open_transaction_is_waited_for_by_a_plain_one(claims: Claimants, database: str) -> None:
    session, other = await expecting_session(claims), await claims.session()
    watcher = await asyncpg.connect(database)

    async def waits() -> Any:
        return await watcher.fetchval("select count(*) from pg_locks where not granted")

    for end, is_known in ((other.rollback, False), (other.commit, True)):
        held = uuid4()
        await other.begin()
        await other.claim(claims.deliveries([held]), claims.topics)
        assert session.claims.history.expects_new
        waiting = asyncio.create_task(claims.commit(session, offered := claims.deliveries([uuid4(), held])))
        await until("the claim to wait", waits)
        await end()
        assert set(await waiting) == (set(offered[1:]) if is_known else set())
        assert await watcher.fetchval("select count(*) from consumer.ledger where id = $1", held) == 1
    await watcher.close()


async def test_violation_of_an_index_of_somebody_else_is_no_known_id(claims: Claimants, database: str) -> None:
    session = await expecting_session(claims)
    owner = await asyncpg.connect(database)
    await owner.execute("delete from consumer.ledger")
    await owner.execute('create unique index of_somebody_else on consumer.ledger ("offset")')
    await owner.close()
    assert await claims.commit(session, claims.deliveries([uuid4()])) == {}
    with pytest.raises(asyncpg.UniqueViolationError, match="of_somebody_else"):
        await claims.commit(session, claims.deliveries([uuid4()]))
    await session.rollback()
    assert await session.connection.fetchval("select count(*) from consumer.ledger") == 1


async def test_claim_that_expects_new_ids_sees_every_generation(claims: Claimants, database: str) -> None:
    """Meanwhile an id may be claimed in two places.

    A plain insert does not see that.
    """
    session = await expecting_session(claims)
    known = [uuid4() for _ in range(3)]
    await claims.commit(session, claims.deliveries(known))
    owner = await asyncpg.connect(database)
    while await owner.fetchval("select consumer.turn((select version from consumer.ledger_state))") != "turned":
        assert session.claims.history.expects_new
        again = claims.deliveries([*known, uuid4()])
        assert set(await claims.commit(session, again)) == set(again[:3])
        session.claims.history.__init__()  # type: ignore[misc]  # as if it had met new ids only
        while not session.claims.history.expects_new:
            session.claims.history.claimed(1, 0)
    again = claims.deliveries([*known, uuid4()])
    assert set(await claims.commit(session, again)) == set(again[:3])
    assert await owner.fetchval("select count(*) - count(distinct id) from consumer.ledger") == 0
    assert await owner.fetchval("select count(*) from consumer.ledger_2") > 0
    await owner.close()


async def test_wrong_expectations_waste_few_rows(claims: Claimants, database: str) -> None:
    """With a duplicate in every fifth claim.

    Each surprise doubles the number of clean claims that the next one needs.
    """
    session = await claims.session()
    known = uuid4()
    await claims.commit(session, claims.deliveries([known]))
    for number in range(1, 200):
        ids = [uuid4() for _ in range(10)]
        await claims.commit(session, claims.deliveries([*ids, known] if number % 5 == 0 else ids))
    assert await session.connection.fetchval("select count(*) from consumer.ledger") == 1 + 199 * 10
    assert await dead_rows(claims, database) <= 20  # 390 if each claim in five were wrong


async def advisory_locks(session: Session, watcher: asyncpg.Connection) -> set[tuple[str, str]]:
    """The advisory locks that a session's transaction holds.

    Of the ledger's version, and of the turns after conflicts.
    """
    names = {claim_sql.ADVISORY_CLASS: "version", CONFLICTS_CLASS: "turn"}
    rows = await watcher.fetch(
        "select classid::int8, mode from pg_locks where locktype = 'advisory' and granted and pid = $1",
        session.connection.get_server_pid(),
    )
    return {(names[row[0]], row[1]) for row in rows}


async def test_transaction_holds_the_version_lock_with_and_without_its_turn(claims: Claimants, database: str) -> None:
    """Without the lock a generation could be dropped below a claim.

    Then its id would be claimed again.
    """
    claims.settings = claims.settings.model_copy(update={"postgres_lock_timeout_seconds": 0.2})
    session, other = await claims.session(), await claims.session()
    watcher = await asyncpg.connect(database)
    try:
        version, turn = ("version", "ShareLock"), ("turn", "ExclusiveLock")
        await session.begin()
        assert await advisory_locks(session, watcher) == {version}
        await session.rollback()
        session.turn = other.turn = 7
        await session.begin()
        assert await advisory_locks(session, watcher) == {version, turn}
        await other.begin()  # its turn does not come
        assert await advisory_locks(other, watcher) == {version}
        assert other.turn is None
    finally:
        await watcher.close()
