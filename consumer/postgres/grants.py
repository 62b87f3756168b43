"""The rights of each role on the framework's tables.

They are printed as SQL, and checked at start. Pure: writes SQL and runs none. Limitations: you grant the rights on the
tables of your handlers.
`tests/postgres/test_grants.py` fails for a table or function of the schema that is not named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from consumer.core.errors import Misconfigured
from consumer.core.identifiers import BYTES_MAX, ident

# Rights of a table, as GRANT writes them. A worker applies messages, stores dead letters and runs every command but
# `migrate`. In the ledger it may change one column. It may delete rows, because a message that is tried again releases its
# claim in the transaction that inserted it.
_WORKER: Mapping[str, tuple[str, ...]] = {
    "schema_versions": ("select",),
    "installation": ("select",),
    "handlers": ("select", "insert", "update (topics, id_rule)"),
    "handler_renames": ("select",),
    "coverage": ("select", "insert", "update (past_offset, first_offset, why)", "delete"),
    "id_rule_changes": ("select", "insert", "update (below)", "delete"),
    "handler_code": ("select", "insert", "update (last_seen)"),
    "topics": ("select", "insert"),
    "ledger": ("select", "insert", "delete", "update (applied_at)"),
    "positions": (
        "select",
        "insert",
        "update (next_offset, first_offset, updated_at, cluster_id, topic_id, salt, seen_offset, seen_timestamp, seen_fingerprint, "
        "handlers, began_with, holds)",
    ),
    "generations": ("select",),
    "ledger_state": ("select",),
    "turning": ("select", "insert", "delete"),
    "forgotten": ("select",),
    "retention": ("select", "insert", "update (hours, said_at)"),
    "outcomes": ("select", "insert", "update (count)"),
    "shards": ("select", "insert"),
    "route_probes": ("select", "insert"),
    "dead_letters": (
        "select",
        "insert",
        "update (state, chain, reason, error, attempts, kind, error_group, died_at, trace)",
    ),
    # PostgreSQL requires a right to update for a row lock; no column of these two is ever updated.
    "held": ("select", "insert", "update (topic)", "delete"),
    "letters_to_publish": ("select", "insert", "update (dead_letter)", "delete"),
    "attempts": ("select", "insert", "update (attempts, due_at)", "delete"),
    "pauses": ("select", "insert", "delete"),
    "audit": ("select", "insert"),
    "letter_results": ("select", "insert"),
    "letter_actions": ("select", "insert"),  # for commands of the previous version
    "stopped_partitions": (
        "select",
        "insert",
        'update (reason, why, "do", first_offset, last_offset, since)',
        "delete",
    ),
    "waiting": (
        "select",
        "insert",
        "update (count, since, systemic, read_up_to, worker, seen_at)",
        "delete",
    ),
    "outbox_streams": ("select", "insert", "update (next_seq)"),
    "outbox_published": ("select", "insert", "update (next_seq, stopped, stopped_at, updated_at)"),
    "outbox": ("select", "insert"),
    "outbox_generations": ("select",),
    "outbox_actions": ("select", "insert"),  # for commands of the previous version
    # PostgreSQL requires a right to update for a row lock; no column is ever updated.
    "outbox_intake": ("select", "insert", "update (topic)", "delete"),
    "effects": ("select", "insert", "update (attempts, result, result_at)", "delete"),
}
# Enough for `status`, `show` and dashboards. Of a dead letter, no byte of the message, and not the error's text, which may quote it.
_READER: Mapping[str, tuple[str, ...]] = {
    "schema_versions": ("select",),
    "installation": ("select",),
    "handlers": ("select",),
    "handler_renames": ("select",),
    "coverage": ("select",),
    "id_rule_changes": ("select",),
    "handler_code": ("select",),
    "topics": ("select",),
    "ledger": ("select",),
    "generations": ("select",),
    "ledger_state": ("select",),
    "turning": (),
    "forgotten": ("select",),
    "retention": ("select",),
    "positions": ("select",),
    "outcomes": ("select",),
    "shards": ("select",),
    "route_probes": (),  # keys of messages
    "dead_letters": (
        'select (dead_letter, handler, id, fingerprint, topic, partition, "offset", "timestamp", reason, attempts, died_at, '
        "state, chain, kind, error_group, trace)",
    ),
    "held": ("select",),
    "letters_to_publish": ("select",),
    "attempts": ("select",),
    "waiting": ("select",),
    "pauses": ("select",),
    "audit": ("select",),
    "letter_results": (),  # may quote messages
    "letter_actions": (),
    "stopped_partitions": ("select",),
    "outbox_streams": ("select",),
    "outbox_published": ("select",),
    "outbox": ("select (generation, stream, seq, id, topic, type, traceparent, created_at, handler, source_offset)",),
    "outbox_generations": ("select",),
    "outbox_actions": (),
    "outbox_intake": ("select (app, place, id, topic, created_at)",),
    "effects": ("select (handler, id, key, payload, first_at, attempts, result_at)",),
}
# Enough for `app.publishing` in a web application: it inserts, and reads nothing of this schema.
_PUBLISHER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_WORKER, ()),
    "outbox_intake": ("insert (app, id, topic, key, value, headers)",),
}


class For(Enum):
    """What a role is for."""

    WORKER = "worker"
    READER = "reader"
    PUBLISHER = "publisher"


TABLES: Mapping[For, Mapping[str, tuple[str, ...]]] = {
    For.WORKER: _WORKER,
    For.READER: _READER,
    For.PUBLISHER: _PUBLISHER,
}
# Turning the ledger and the outbox to their next generations and dropping the oldest ones, as their owner: `consumer run`
# does it in the background. is_drained and generation only read.
_FUNCTIONS: Mapping[For, tuple[str, ...]] = {
    For.WORKER: (
        "turn(integer)",
        "forget(integer, integer)",
        "drop_generation(integer)",
        "is_drained(integer)",
        "generation(integer)",
        "turn_outbox(double precision, bigint)",
        "drop_outbox(double precision)",
        "erase_letters(bigint[])",
    ),
    For.READER: (),
    For.PUBLISHER: (),
}


def as_sql(role: str, purpose: For) -> str:
    """Return a role's grants, as a script for the tables' owner.

    It first revokes what the role had on them. Raises Misconfigured for text that cannot be the name of a role.
    """
    if role.lower() == "public" or len(role.encode("utf-8", "surrogatepass")) > BYTES_MAX:
        raise Misconfigured(f"{role[:80]!r}: not a role; name one that logs in, of at most {BYTES_MAX} bytes")
    name = ident(role)
    lines = [
        f"-- What a {purpose.value}'s role may do in the schema of `consumer migrate`, and nothing else. Run it as the owner",
        "-- of that schema, again after each migration. The role must exist; rights on your own tables are yours to give.",
        "begin;",
        f"revoke all on schema consumer from {name};",
        f"revoke all on all tables in schema consumer from {name};",
        f"grant usage on schema consumer to {name};",
        f"revoke all on all functions in schema consumer from {name};",
        *(
            f"grant {', '.join(rights)} on consumer.{table} to {name};"
            for table, rights in TABLES[purpose].items()
            if rights
        ),
        *(f"grant execute on function consumer.{function} to {name};" for function in _FUNCTIONS[purpose]),
        "select consumer.share_grants();  -- with the later generations of the ledger",
        "commit;",
    ]
    return "\n".join([*lines, ""])


def needed() -> tuple[list[str], list[str]]:
    """Return the rights that a worker needs: tables and rights."""
    pairs = [(table, right.split(" ")[0]) for table, rights in _WORKER.items() for right in rights]
    return [table for table, _ in pairs], [right for _, right in pairs]
