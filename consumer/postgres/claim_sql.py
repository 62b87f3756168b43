"""The SQL of a claim, for the live generations of the ledger.

Text only; claims.py runs it.

migrations/0001_schema.sql explains generations, and how a turn goes from one to the next without holding up a claim or
letting an id be claimed in both. With one generation a claim is a plain insert; each older one costs an index probe per
id.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

ADVISORY_CLASS = 1189079  # of the locks that show whether a claim of a version is running


class Generations(NamedTuple):
    """The live generations, as of a version.

    A claim reads the version again, and is undone if it has changed.
    """

    version: int
    target: int  # the generation that claims go into
    turning: bool  # whether they go into consumer.turning first
    live: tuple[int, ...]  # where an id may have been claimed, the target among them
    horizon_ms: (
        int | None
    )  # milliseconds since 1970 UTC, by the database's clock: older rows may be gone. None: none are


FIRST = Generations(version=1, target=1, turning=False, live=(1,), horizon_ms=None)

READ = """
select version, target, turning, array(select number from consumer.generations where forgotten_at is null order by number),
       ceil(extract(epoch from horizon) * 1000)::int8
from consumer.ledger_state
"""


class Statements(NamedTuple):
    """The statements of a claim's transaction.

    Their parameters are handler, id, fingerprint, topic, partition, offset and applied, as arrays. Those that end in
    _alike are for messages of one handler and partition. claim_new fails where an id has a claim; None while it cannot
    know, because an id may be claimed in more than one place.
    """

    claim: str
    claim_alike: str
    claim_new: str | None
    claim_new_alike: str | None
    standing: str
    standing_alike: str
    release_claims: str
    mark_claims_dead: str


_OFFERED = """
with offered as materialized (
    select * from unnest($1::int2[], $2::uuid[], $3::int8[], $4::int2[], $5::int4[], $6::int8[], $7::bool[])
        with ordinality as o(handler, id, fingerprint, topic, partition, "offset", applied, place)
)"""
# The same for offers of one handler from one partition: three arrays instead of seven.
_OFFERED_ALIKE = """
with offered as materialized (
    select $1::int2 as handler, id, fingerprint, $4::int2 as topic, $5::int4 as partition, "offset", $7::bool as applied, place
    from unnest($2::uuid[], $3::int8[], $6::int8[]) with ordinality as o(id, fingerprint, "offset", place)
)"""
# Not in the generation. An index probe per id, whatever size the planner assumes (a join may scan the table).
_ABSENT = "coalesce((select false from {table} l where l.handler = o.handler and l.id = o.id limit 1), true)"
_FRESH = """, fresh as materialized (
    select * from offered o where {absent}
)"""
_TURNED = """, turned as (
    insert into consumer.turning (handler, id) select handler, id from {source} order by handler, id
    on conflict do nothing
    returning handler, id
)"""
_CLAIMED = """, claimed as (
    insert into {target} (handler, id, fingerprint, topic, partition, "offset", applied_at)
    select handler, id, fingerprint, topic, partition, "offset", case when applied then now() end
    from {source} order by handler, id
    on conflict (handler, id) do nothing
    returning handler, id
)"""
# The places of the offers that were lost; among them those of another record, of dead letters, of another payload, and
# those that this statement cannot see. One index probe each (a join may scan the ledger). And the version, as it is now.
_LOST = """
select array_agg(place), array_agg(place) filter (where not same_record), array_agg(place) filter (where dead),
       array_agg(place) filter (where clashes), array_agg(place) filter (where same_record is null),
       (select version from consumer.ledger_state)
from offered o left join lateral (
    select (l."offset", l.partition, l.topic) = (o."offset", o.partition, o.topic) as same_record,
           l.applied_at is null as dead, l.fingerprint <> o.fingerprint as clashes
    from {ledger} l where l.handler = o.handler and l.id = o.id limit 1
) as found on true
"""
# A plain insert: 3.0 us of PostgreSQL's CPU time for a row, where the claim that returns what it has lost takes 6.2, and a
# fifth less WAL (measured with PostgreSQL 18). Its answer has the columns of _LOST.
_NEW = """
with claimed as (
    insert into {target} (handler, id, fingerprint, topic, partition, "offset", applied_at) {offered} order by handler, id
)
select null::int8[], null::int8[], null::int8[], null::int8[], null::int8[], (select version from consumer.ledger_state)
"""
_NEW_OFFERED = """
    select handler, id, fingerprint, topic, partition, "offset", case when applied then now() end
    from unnest($1::int2[], $2::uuid[], $3::int8[], $4::int2[], $5::int4[], $6::int8[], $7::bool[])
        as o(handler, id, fingerprint, topic, partition, "offset", applied)"""
_NEW_OFFERED_ALIKE = """
    select $1::int2 as handler, id, fingerprint, $4::int2, $5::int4, "offset", case when $7::bool then now() end
    from unnest($2::uuid[], $3::int8[], $6::int8[]) as o(id, fingerprint, "offset")"""
# Hashed: a join would run as nested loops, since the planner expects few rows.
_NOT_CLAIMED = "where (o.handler, o.id) not in (select handler, id from claimed)"
_OF_THEM = "{source} where ((handler, id) in (select handler, id from turned)) is true"
_EVERYWHERE = 'select handler, id, fingerprint, topic, partition, "offset", applied_at from {table}'
_RELEASE_CLAIMS = "delete from {target} l using unnest($1::int2[], $2::uuid[]) as o(handler, id) where (l.handler, l.id) = (o.handler, o.id)"
_RELEASE_CLAIMS_TURNING = "with turned as (" + _RELEASE_CLAIMS.format(target="consumer.turning") + ") "
_MARK_CLAIMS_DEAD = """
update {target} l set applied_at = null
from unnest($1::int2[], $2::uuid[]) as o(handler, id) where (l.handler, l.id) = (o.handler, o.id)
"""

# Existing claims in all generations, for transactions without a version's lock. Waits while one is being dropped.
STANDING = _OFFERED + _LOST.format(ledger="consumer.ledger")


@lru_cache(maxsize=32)
def statements(target: int, turning: bool, live: tuple[int, ...]) -> Statements:
    """Return the statements for these generations.

    They name no other generation, so they wait for no other one.
    """
    claimed = _claimed(target, turning, [number for number in live if number != target])
    everywhere = " union all ".join(_EVERYWHERE.format(table=_read(number)) for number in live)
    lost = _LOST.format(ledger=_read(target) if live == (target,) else f"({everywhere})")
    release_claims = _RELEASE_CLAIMS.format(target=_read(target))
    if turning:
        release_claims = _RELEASE_CLAIMS_TURNING + release_claims
    is_one_place = live == (target,) and not turning
    return Statements(
        claim=_OFFERED + claimed + lost + _NOT_CLAIMED,
        claim_alike=_OFFERED_ALIKE + claimed + lost + _NOT_CLAIMED,
        claim_new=_NEW.format(target=_write(target), offered=_NEW_OFFERED) if is_one_place else None,
        claim_new_alike=_NEW.format(target=_write(target), offered=_NEW_OFFERED_ALIKE) if is_one_place else None,
        standing=_OFFERED + lost,
        standing_alike=_OFFERED_ALIKE + lost,
        release_claims=release_claims,
        mark_claims_dead=_MARK_CLAIMS_DEAD.format(target=_read(target)),
    )


def _claimed(target: int, turning: bool, older: list[int]) -> str:
    source, text = "offered", ""
    if older:
        absent = " and ".join(_ABSENT.format(table=_read(number)) for number in older)
        source, text = "fresh", _FRESH.format(absent=absent)
    if turning:
        text += _TURNED.format(source=source)
        source = _OF_THEM.format(source=source)
    return text + _CLAIMED.format(target=_write(target), source=source)


def _write(number: int) -> str:
    return "consumer.ledger" if number == 1 else f"consumer.ledger_{int(number)}"


def _read(number: int) -> str:
    """Return the name to read one generation.

    The first one is the parent of the others: without ONLY they would be read too.
    """
    return "only consumer.ledger" if number == 1 else _write(number)
