-- Effects: calls of other systems. The row of a call is committed before it, and says afterwards what it has returned.

create table consumer.effects (
    handler   smallint not null references consumer.handlers,
    id        uuid not null,                      -- of the message
    key       text not null,                      -- sent with every call, also after the handler was renamed
    payload   bigint not null,                    -- fingerprint of the message's bytes
    first_at  timestamptz not null default now(), -- the other system has known the key since then, at the earliest
    attempts  integer not null default 1,         -- calls that were begun
    result    bytea,                              -- null: not known, the call may have been made
    result_at timestamptz,
    primary key (handler, id)
) with (fillfactor = 80);
-- Results go when the ledger has forgotten their messages.
create index effects_first_at on consumer.effects using brin (first_at);
