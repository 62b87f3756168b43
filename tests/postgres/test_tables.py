"""Every query and write of a table runs with a worker's rights."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import asyncpg
import pytest
from asyncpg.pgproto.pgproto import UUID
from harness import as_worker, migrated

from consumer.core.message import Partition
from consumer.core.retention import Generation
from consumer.postgres import (
    applied_queries,
    claims,
    dead_letter_actions,
    dead_letter_copies,
    dead_letter_queries,
    dead_letters,
    generations,
    handler_history,
    handlers,
    ledger_queries,
    positions,
    server,
    shard_tables,
)
from consumer.postgres.applied_queries import Fact, Offers
from consumer.postgres.dead_letter_actions import Action, Settled
from consumer.postgres.dead_letter_queries import Matching, OpenMatching, Standing
from consumer.postgres.handler_history import Covered, Registered
from consumer.postgres.shard_tables import Enrolled, Probe

APP = "shop"
P = Partition("orders", 0)
ID = uuid4()


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    await migrated(database)
    connection = await asyncpg.connect(as_worker(database))
    yield connection
    await connection.close()


async def register(connection: asyncpg.Connection, *names: str) -> dict[str, int]:
    numbers, _ = await handlers.register(connection, APP, names, ["orders"])
    return numbers


async def letter(connection: asyncpg.Connection, handler: int, offset: int, state: str, chain: object = ID) -> int:
    number: int = await connection.fetchval(
        """insert into consumer.dead_letters (handler, id, fingerprint, topic, partition, "offset", "timestamp", value,
                  header_keys, header_values, reason, error, attempts, state, chain, error_group)
           values ($1, gen_random_uuid(), 7, 'orders', 0, $2, 0, 'value', '{}', '{}', 'failed', 'error', 1, $3, $4, 'group')
           returning dead_letter""",
        handler,
        offset,
        state,
        chain,
    )
    return number


async def test_handlers_are_numbered_once_and_named(connection: asyncpg.Connection) -> None:
    first = await register(connection, "bill")
    assert await register(connection, "ship") == {**first, "ship": first["bill"] + 1}
    known, topics = await handlers.known(connection, APP, ["bill", "new"], ["orders", "new"])
    assert (known, topics) == ({"bill": first["bill"], "new": -2}, {"orders": 1, "new": -2})
    assert await handlers.apps(connection) == [APP]
    assert sorted(await handlers.names(connection, APP)) == sorted(await handlers.names(connection, None))
    assert await handlers.lock_numbers(connection, APP) == await handlers.numbers(connection, APP)


async def test_positions_are_begun_moved_and_restarted(connection: asyncpg.Connection) -> None:
    assert await positions.lock(connection, APP, P) is None
    assert not await positions.exist(connection, APP)
    await positions.move(connection, APP, P, 5)
    await positions.move(connection, APP, P, 3)
    assert await positions.horizons(connection, APP) == {P: positions.Horizon(3, 3)}
    assert await positions.of_topics(connection, APP, ["other"]) == {}
    topic_id = uuid4()
    await positions.name_logs(connection, APP, {P: ("cluster", topic_id)})
    await positions.set_handlers(connection, APP, {P: "1"})
    assert await positions.lock_settling(connection, APP, [P]) == {P: positions.Settling(3, 3, "1")}
    await positions.restart(connection, APP, P, 9, "other", topic_id, b"salt")
    assert await positions.settling(connection, APP) == {P: positions.Settling(9, 9, None, None)}
    assert await positions.salts(connection, "orders", "0") == [b"salt"]
    await positions.lock_app(connection, APP)
    number = (await register(connection, "bill"))["bill"]
    await positions.lock_of_handler(connection, number, [P])
    await positions.count_hold(connection, number, [P])
    assert (await positions.read_positions(connection, APP, [P]))[P].hold_count == 1
    await positions.rewind(connection, APP)
    assert await positions.next_offsets(connection, APP) == {P: 0}
    assert await positions.exist(connection, APP)
    assert (await positions.counts(connection, APP), await positions.applied_by_all(connection, [1])) == ([], {})


async def test_coverage_id_rules_and_code_are_kept_per_handler(connection: asyncpg.Connection) -> None:
    number = (await register(connection, "bill"))["bill"]
    await handler_history.record_topics(connection, APP, {"bill": ("orders", "refunds")})
    assert await handler_history.registered(connection, APP) == {
        "bill": Registered(number, ["orders", "refunds"], False)
    }
    await handler_history.begin_coverage(connection, [(P, number, 10)])
    await handler_history.end_coverage(connection, [(P, number, 20)])
    await handler_history.cover(connection, number, [(P, 30, 40)], "declared")
    await handler_history.begin_coverage(connection, [(P, number, 50)])
    await handler_history.move_coverage_back(connection, APP, P, 45)
    assert sorted(await handler_history.coverage(connection, APP)) == [
        Covered(number, P, 10, 20, "settled"),
        Covered(number, P, 30, 40, "declared"),
        Covered(number, P, 45, None, "settled"),
    ]
    await handler_history.record_id_rules(connection, APP, {"bill": "field:id"})
    await handler_history.record_id_rules(connection, APP, {"bill": "ignored"})
    await handler_history.change_id_rule(connection, number, "field:key", [(P, 3), (P, 8), (P, 5)])
    await handler_history.change_id_rule(connection, number, "field:key", [(P, 6)])
    assert await handler_history.id_rules(connection, APP) == {"bill": "field:key"}
    assert await handler_history.id_rule_floors(connection, APP) == {("bill", P): 8}
    await handler_history.record_code(connection, APP, [])
    await handler_history.record_code(connection, APP, [("bill", "code", "id")])
    assert [seen[:3] for seen in await handler_history.code(connection, APP)] == [("bill", "code", "id")]
    await handler_history.forget_partition(connection, APP, P)
    await handler_history.forget_handler(connection, number)
    assert await handler_history.coverage(connection, APP) == []
    assert await handler_history.id_rule_floors(connection, APP) == {}


async def test_the_generations_and_what_was_declared_of_them(connection: asyncpg.Connection) -> None:
    await register(connection, "bill")
    state = await generations.read_state(connection)
    assert (state.version, state.target, state.turning, state.horizon) == (1, 1, False, None)
    assert [type(generation) for generation in state.generations] == [Generation]
    assert await generations.turn(connection, 0) == "busy"
    assert await generations.forget(connection, 1, 1) == "busy"
    assert await generations.drop(connection, 1) == "busy"
    assert await generations.declared(connection) == {APP: None}
    await generations.declare(connection, APP, 24)
    assert (await generations.declared(connection), await generations.declared(connection, APP)) == ({APP: 24}, {})
    assert await generations.estimated_rows(connection) == {1: 0}
    assert await generations.horizon_ms(connection) is None
    assert await generations.horizon_text(connection) == "None"
    assert await generations.forgotten_below(connection, [1]) == {}
    assert not await generations.has_forgotten(connection)
    assert await server.schema_version(connection) >= 1
    assert (await server.installed_at(connection)).isdecimal()


async def test_shards_and_probes_are_kept_until_they_are_forgotten(
    connection: asyncpg.Connection, database: str
) -> None:
    assert await shard_tables.enrolled(connection, APP) is None
    await shard_tables.enroll(connection, APP, "a", ["a", "b"])
    await shard_tables.enroll(connection, APP, "b", ["b"])
    assert await shard_tables.enrolled(connection, APP) == Enrolled("a", ["a", "b"])
    assert not await shard_tables.has_probes(connection, APP)
    await shard_tables.record_probes(connection, APP, [b"k", None], "a")
    assert sorted(await shard_tables.probes(connection, APP), key=str) == [Probe(None, "a"), Probe(b"k", "a")]
    assert await shard_tables.contradicting_probes(connection, APP, [b"k"], "a") == []
    assert await shard_tables.contradicting_probes(connection, APP, [b"k"], "b") == [Probe(b"k", "a")]
    owner = await asyncpg.connect(database)
    await shard_tables.forget(owner, APP)  # of `consumer migrate`
    await owner.close()
    assert (await shard_tables.enrolled(connection, APP), await shard_tables.probes(connection, APP)) == (None, [])


async def test_claims_of_dead_letters_are_revived_marked_and_dropped(connection: asyncpg.Connection) -> None:
    number = (await register(connection, "bill"))["bill"]
    await connection.execute(
        """insert into consumer.ledger (handler, id, fingerprint, topic, partition, "offset") values ($1, $2, 7, 1, 0, 4)""",
        number,
        ID,
    )
    key = (number, UUID(ID.bytes))
    assert await claims.revive(connection, [key], [8]) == []  # with another payload
    assert await claims.revive(connection, [key], [7]) == [key]
    await claims.drop_dead(connection, [key])  # it is not dead
    assert await claims.claimed_ids(connection, [(number, ID.bytes), (number, bytes(16))]) == {(number, ID.bytes)}
    assert await ledger_queries.settled_below(connection, number) == {P: 5}
    assert await ledger_queries.rows_by_handler(connection, APP) == {"bill": 1}
    assert await ledger_queries.other_handlers(connection, APP, [], ["orders"]) == ["bill"]
    assert [row["handler"] for row in await ledger_queries.show(connection, [ID.bytes])] == ["bill"]
    await claims.mark_dead_again(connection, [key])
    assert await claims.exist(connection, number)
    await claims.drop_dead(connection, [key])
    assert not await claims.exist(connection, number)


async def test_rebuilds_and_checks_read_what_was_applied(connection: asyncpg.Connection) -> None:
    number = (await register(connection, "bill"))["bill"]
    dead = uuid4()
    await connection.execute("create temporary table consumer_dead (handler int, id uuid, fingerprint int8)")
    await connection.execute(
        """insert into consumer.ledger (handler, id, fingerprint, topic, partition, "offset", applied_at)
           values ($1, $2, 7, 1, 0, 4, to_timestamp(1)), ($1, $3, 7, 1, 0, 5, null)""",
        number,
        ID,
        dead,
    )
    offers = Offers([number] * 3, [ID, ID, dead], [7, 8, 7])
    fact = Fact(1_000_000, "orders", 0, 4, True)
    a = applied_queries
    assert await a.collect_dead(connection, [number]) == 1
    assert await a.dead_places(connection, offers) == [3]
    assert await a.applied_places(connection, offers) == [1]
    assert await a.facts(connection, offers) == [(1, fact), (2, fact._replace(is_alike=False))]
    times = await a.times(connection, offers, [4, 4, 5], P)
    assert times == ([(1, 1_000_000)], [(2, fact._replace(is_alike=False))])
    assert await a.count_applied_at(connection, [(number, P, 4), (number, P, 5)]) == 1
    assert await a.applied_beyond(connection, [(P, 2)], [number]) == {P: 5}
    age, is_restored = await a.oldest_age(connection, [number])
    assert age is not None and not is_restored
    assert await a.rows_and_ledger(connection, "consumer.ledger", [number], age) == (0, True)

    q = ledger_queries
    assert await q.claiming_record(connection, number, ID) == (P, 4)
    assert await q.claiming_record(connection, number, uuid4()) is None
    assert await q.block_counts(connection, [number], q.NumberedRanges([1], [0], [0], [9]), 2) == [(number, 1, 0, 1, 2)]
    assert [row[3] for row in await q.rows_nowhere(connection, [number], [1], [0], [5])] == [dead]
    assert await q.rows_between(connection, number, 1, 0, 0, 5) == [(ID, 4)]
    assert await q.absent_ids(connection, number, [ID.bytes, bytes(16)]) == {bytes(16)}


async def test_dead_letters_are_listed_locked_settled_and_recorded(connection: asyncpg.Connection) -> None:
    handler = (await register(connection, "bill"))["bill"]
    dead, waiting = await letter(connection, handler, 1, "dead"), await letter(connection, handler, 2, "waiting")
    await connection.execute(
        "insert into consumer.held (handler, chain, topic, partition) values ($1, $2, 'orders', 0)", handler, ID
    )
    everything = Matching(APP, "bill", "orders", "failed", 10, "group", ["dead", "waiting"], None, 60)
    is_open = OpenMatching(APP, [dead, waiting], "bill", "orders", "failed", "group", None, 60)
    q, chain = dead_letter_queries, (handler, ID)
    assert [row["letter"] for row in await q.newest(connection, everything)] == [waiting, dead]
    assert [(row["count"], row["letter"]) for row in await q.groups(connection, everything)] == [(2, dead)]
    assert await q.open_counts(connection, APP) == [("bill", "dead", 1), ("bill", "waiting", 1)]
    assert await q.error_groups(connection, APP, None) == await q.error_groups(connection, None, "group") == ["group"]
    assert list(await q.select(connection, is_open, waiting=False, too_old=False)) == [dead]
    assert list(await q.select(connection, is_open, waiting=True, too_old=True)) == [dead, waiting]
    assert await q.count_unsure(connection, is_open) == 0
    assert await q.standings(connection, [waiting]) == {waiting: Standing("waiting", APP, "bill", dead)}
    assert await q.sizes(connection, [dead]) == [(dead, False, 5)]
    assert await q.first_of(connection, [chain], 5) == [(1, dead, False), (1, waiting, True)]
    assert list(await q.whole(connection, [dead, waiting])) == [dead, waiting]
    one = await q.one(connection, waiting)
    assert one is not None and (one["first"], one["behind"]) == (dead, 0)

    a = dead_letter_actions
    async with connection.transaction():
        assert list(await a.lock(connection, [dead])) == [dead]
        assert await a.first_others(connection, [dead]) == {chain: (2, waiting)}
        await a.settle(connection, [Settled(dead, "applied", False, "failed", "error", 2, "", "group")])
        await a.record(connection, [Action(dead, "me", "dlq retry", "applied", "", "", None, None)])
        assert await a.release(connection, [chain]) == []  # one of it is left
        await a.settle(connection, [Settled(waiting, "discarded", False, "failed", "error", 2, "", "group")])
        assert await a.release(connection, [chain]) == [chain]
    assert [row["letter"] for row in await q.actions(connection, dead, 5)] == [dead]
    assert [row["letter"] for row in await q.actions_on(connection, everything._replace(states=None))] == [dead]
    copies = await dead_letter_copies.of_numbers(connection, [waiting, dead], "letters")
    assert [(copy.record.topic, copy.source, copy.offset) for copy in copies] == [("letters", P, 1), ("letters", P, 2)]
    assert await dead_letter_copies.of_new(connection, [(handler, ID.bytes, 7)], "letters") == []  # of this transaction
    ranges = q.Ranges(["orders"], [0], [0], [9])
    selection = q.Selection([handler], ranges, None, None)
    assert await q.last_number(connection) == waiting
    assert await q.count_since(connection, dead, [handler], ranges) == 1
    assert await q.too_old(connection, [handler], ["orders"]) == []
    assert await q.applied_edits(connection, [handler], ["orders"], 5) == []
    assert await q.edits_under_new_ids(connection, selection, after=0, limit=5) == []
    await a.record(connection, [Action(dead, "me", "dlq retry", "applied", "", "", None, None)])
    assert (await q.applied_retries(connection, [handler], ["orders"], 5))[0][0] == (handler, P, 1)
    assert await q.sealed_sizes(connection, selection) == [(dead, 5), (waiting, 5)]
    assert [row["value"] for row in await q.sealed(connection, [dead])] == [b"value"]
    assert q.Ranges.of([(P, 0, 9)]) == ranges
    id = (await q.whole(connection, [waiting]))[waiting]["id"]
    keys = [(handler, id, 7, 10), (handler, id, 8, 11)]
    assert await q.settled_places(connection, keys) == {10}
    await dead_letters.replace_error(connection, handler, id, 7, before="another", error="not written")
    await dead_letters.replace_error(connection, handler, id, 7, before="error", error="explained")
    assert (await q.whole(connection, [waiting]))[waiting]["error"] == "explained"
    assert await dead_letters.exist(connection, handler)
    await dead_letters.forget_attempts_of(connection, handler)
    await dead_letters.forget_attempts_in(connection, APP, P)
