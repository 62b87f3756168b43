"""Faults that are planted into a live system.

And which answers must notice them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from uuid import uuid4

import asyncpg
from harness import until

# A message below the position that nothing will deliver again, and its row.
_VICTIM = """
select l.id, t.name, l.partition, l."offset" from consumer.ledger l
join consumer.handlers h using (handler) join consumer.topics t using (topic)
join consumer.positions p on p.app = h.app and p.topic = t.name and p.partition = l.partition
where h.app = $1 and h.name = $2 and l.applied_at is not null and l."offset" < p.next_offset and l."offset" >= 0
  and l.id <> all ($3) and not exists (select from consumer.dead_letters d where d.id = l.id)
order by random() limit 1
"""


_HANDLER = "(select handler from consumer.handlers where name = $2)"
_WRITES = {
    "lost effect": "delete from effects where id = $1 and handler = $2",
    "foreign row": "insert into effects select $2, $3, key, amount from effects where id = $1 and handler = $2",
    "altered row": """update balances set balance = balance + 1
        where (handler, key) = (select handler, key from balances order by random() limit 1)""",
    "deleted ledger row": f"delete from consumer.ledger where id = $1 and handler = {_HANDLER}",
    "foreign ledger row": f"""insert into consumer.ledger (handler, id, fingerprint, topic, partition, "offset", applied_at)
        select handler, $3, fingerprint, topic, partition, "offset", applied_at from consumer.ledger
        where id = $1 and handler = {_HANDLER}""",
}
KINDS = tuple(_WRITES)


@dataclass(frozen=True)
class Planted:
    """A planted fault.

    seen_by: whether an answer promises to notice it: asked with the options of a check, None for a rebuild.
    """

    kind: str
    text: str
    seen_by: Callable[[dict[str, object] | None], bool]


async def plant(kind: str, dsn: str, app: str, recent: Collection[str], chance: random.Random) -> Planted:
    """Plant a fault.

    recent: ids that may be delivered again, whose effects would come back.
    """
    connection = await asyncpg.connect(dsn)
    try:
        handler = chance.choice(["book", "audit"])

        async def victim() -> asyncpg.Record | None:
            return await connection.fetchrow(_VICTIM, app, handler, list(recent))

        row = await until("a message that may be the victim", victim, 60)
        arguments = [row["id"], handler, uuid4()]
        sql = _WRITES[kind]
        tag = await connection.execute(sql, *[argument for n, argument in enumerate(arguments, 1) if f"${n}" in sql])
        assert tag.split()[-1] == "1", (kind, tag)
    finally:
        await connection.close()
    id, topic, partition, offset = row
    text = f"{kind}: {handler} {id} at {topic}:{partition}:{offset}"
    if "ledger" not in kind:
        return Planted(kind, text, lambda asked: asked is None)

    def by_check(asked: dict[str, object] | None) -> bool:
        """Whether a check promises to notice it; a rebuild never does.

        Nor does a check that leaves out the partition, the handler or the time.
        """
        if asked is None or "start" in asked or str(asked.get("end", "position")) not in ("position", "latest"):
            return False
        return asked.get("partitions", (partition,)) == (partition,) and asked.get("handlers", (handler,)) == (handler,)

    return Planted(kind, text, by_check)
