-- The tables and functions of the framework. One schema serves all applications of a database; names are scoped by application.

create schema if not exists consumer;

-- One row. The nonce is part of the epoch, so a recreated database is not mistaken for its predecessor.
create table consumer.installation (
    only_one boolean primary key default true check (only_one),
    nonce    uuid not null default gen_random_uuid(),
    made_at  timestamptz not null default now()
);
insert into consumer.installation default values;


-- Names and numbers -------------------------------------------------------------------------------------------------

-- The ledger stores numbers of handlers and topics: 2 bytes per row instead of a name.
create table consumer.handlers (
    handler smallint generated always as identity primary key,
    app     text not null,
    name    text not null,
    topics  text[] not null default '{}',    -- of the handler's latest registration
    legacy  boolean not null default false,  -- registered before coverage was recorded: covers its topics from their beginning
    id_rule text,                            -- how it identifies messages (rule_text in core/identity.py); null: not known yet
    unique (app, name)
);
create table consumer.topics (
    topic smallint generated always as identity primary key,
    name  text not null unique
);

-- Earlier names of handlers. A worker that still uses one is refused.
create table consumer.handler_renames (
    app        text not null,
    old_name   text not null,
    new_name   text not null,
    renamed_at timestamptz not null default now(),
    operator   text not null
);

-- Which code each handler ran, and when: fingerprints of its source (handler_records/handler_code.py) or its version= option.
-- A worker writes them at start and every few minutes.
create table consumer.handler_code (
    handler    smallint not null references consumer.handlers on delete cascade,
    code       text not null,               -- of everything that the handler does
    id_code    text not null,               -- of the message_id= function alone; '' without one
    first_seen timestamptz not null default now(),
    last_seen  timestamptz not null default now(),
    primary key (handler, code, id_code)
);

-- After an operator accepted another id rule: messages below this offset may have ids of an earlier rule.
create table consumer.id_rule_changes (
    handler   smallint not null references consumer.handlers on delete cascade,
    topic     text not null,
    partition integer not null,
    below     bigint not null,
    primary key (handler, topic, partition)
);


-- The ledger --------------------------------------------------------------------------------------------------------

-- The claim: one row per handler and message id. The primary key is the guarantee.
-- The widest columns come first, so that no byte is lost to padding (72 bytes per row, header included).
create table consumer.ledger (
    fingerprint bigint not null,              -- of the payload: the same id with another payload is a conflict
    "offset"    bigint not null,              -- of the record that claimed the id
    applied_at  timestamptz,                  -- null: the message is a dead letter and has no effects
    partition   integer not null,
    handler     smallint not null,
    topic       smallint not null,
    id          uuid not null,
    constraint ledger_claim primary key (handler, id)
);

-- The ledger is a series of generations, so that old rows leave by dropping tables and never by DELETE. consumer.ledger is
-- the first generation and the parent of the later ones (consumer.ledger_2 and so on): a query on it reads all of them. A
-- claim is inserted into one generation and looked up in the others.
--
-- A turn opens the next generation. It must not let two transactions that do not see each other claim the same id in two
-- generations, and it must not make claims wait, since a batch with slow handlers may take seconds. So a turn goes through
-- four versions of where a claim is inserted. Each version shares a table, and so a unique key, with its neighbours:
--
--     version    inserts into          looks into      target  turning
--     v          N                     older           N       no
--     v + 1      turning, then N       older           N       yes
--     v + 2      turning, then N + 1   N and older     N + 1   yes
--     v + 3      N + 1                 N and older     N + 1   no
--
-- Invariant: two claims that run at the same time are of the same version or of neighbouring versions, so they meet on a
-- unique key. A claim holds the shared advisory lock of its version until its transaction ends, reads the version again once
-- it holds the lock, and is undone if the version has changed. The version is raised only when no session holds the lock of
-- the version before the present one (a later holder of that lock reads the present version and is undone). Claims of v that
-- ended before v + 2 began are visible to claims of v + 2, which look into N.
create table consumer.generations (
    number       integer primary key,
    opened_at    timestamptz not null default now(),
    closed_at    timestamptz,        -- all of its claims were inserted before this time
    forgotten_at timestamptz         -- claims no longer look into it; its table is dropped as soon as no claim holds it
);
insert into consumer.generations (number) values (1);

-- One row: the present version, and where its claims are inserted.
create table consumer.ledger_state (
    only_one boolean primary key default true check (only_one),
    version  integer not null default 1,
    target   integer not null default 1 references consumer.generations,
    turning  boolean not null default false,
    horizon  timestamptz             -- rows inserted up to this time may be gone; null: none are
);
insert into consumer.ledger_state default values;

-- Where claims of neighbouring versions meet during a turn. Emptied before the next one.
create table consumer.turning (
    handler smallint not null,
    id      uuid not null,
    primary key (handler, id)
);

-- Up to which offset each log was settled when rows of it were dropped. Judges records without a usable timestamp.
create table consumer.forgotten (
    handler   smallint not null,
    topic     smallint not null,
    partition integer not null,
    below     bigint not null,
    primary key (handler, topic, partition)
);

-- How long each application wants its rows kept, declared at its latest start; null: for ever.
create table consumer.retention (
    app      text primary key,
    hours    double precision,
    said_at  timestamptz not null default now()
);


-- Progress ----------------------------------------------------------------------------------------------------------

-- Everything below next_offset is settled for every handler of the application. Kafka's committed offset is a copy.
create table consumer.positions (
    app              text not null,
    topic            text not null,
    partition        integer not null,
    next_offset      bigint not null,
    updated_at       timestamptz not null default now(),
    -- Where the application began. Below it the ledger knows nothing, so a replay cannot tell what is missing there.
    first_offset     bigint,
    -- Which log this is: another one may have the same name and the same offsets. Null: not recorded yet.
    cluster_id       text,            -- Kafka's own name of the cluster
    topic_id         uuid,            -- a topic that is deleted and recreated gets another id
    salt             bytea,           -- part of ids derived from offsets; null for the first log of this name
    seen_offset      bigint,          -- a settled record, which must still be at its offset
    seen_timestamp   bigint,
    seen_fingerprint bigint,
    handlers         text,            -- sorted numbers of the handlers that settle from here on; null: not recorded yet
    began_with       text,            -- 'group': began where another client of the Kafka group had committed
    -- How many holds a process other than the partition's owner added (`replay --apply`). The owner's next batch does not
    -- match the number, is undone, and reads the holds again.
    holds            integer not null default 0,
    primary key (app, topic, partition)
) with (fillfactor = 50);

-- Which handlers have settled which offsets. Positions are per application, so a handler that is added, removed, or known to
-- only some workers during a deployment misses what is settled without it. A worker that opens a partition with other
-- handlers than its position names ends and begins ranges at that position. A position advances only for workers whose
-- handlers it names.
create table consumer.coverage (
    handler      smallint not null references consumer.handlers,
    topic        text not null,
    partition    integer not null,
    first_offset bigint not null,
    past_offset  bigint,                          -- null: up to the position
    why          text not null default 'settled', -- settled, replayed, declared (`consumer positions --begin-here`)
    primary key (handler, topic, partition, first_offset)
);

-- How messages ended. Written with the position, so each message counts once. 'kept' counts the applied messages of the
-- ledger's present rows, so that no query has to count rows; 'applied' counts those of dropped generations.
-- One row per partition, because two workers that update the same row would wait for each other.
create table consumer.outcomes (
    handler   smallint not null,
    topic     smallint not null,
    partition integer not null,
    outcome   text not null,
    count     bigint not null,
    primary key (handler, topic, partition, outcome)
) with (fillfactor = 50);

-- Partitions that workers cannot read, and why. A row is written when one stops and deleted when it continues.
create table consumer.stopped_partitions (
    app          text not null,
    topic        text not null,
    partition    integer not null,
    reason       text not null,              -- HaltReason in core/log_identity.py
    why          text not null,
    "do"         text not null,              -- options of `consumer positions`, or an instruction in words
    first_offset bigint not null,
    last_offset  bigint not null,
    since        timestamptz not null default now(),
    primary key (app, topic, partition)
);

-- Messages that wait now, and why. The partition's worker writes a row on change and renews it every few seconds, so any
-- process can report it. Rows that are not renewed expire; those of a worker that stopped for good stay.
create table consumer.waiting (
    handler    smallint not null references consumer.handlers,
    topic      text not null,
    partition  integer not null,
    error      text not null,          -- kind, place and schema objects; never a value
    count      bigint not null,        -- messages that failed with this error, and those behind them
    since      timestamptz not null,
    systemic   boolean not null,       -- every message of the handler fails with it
    read_up_to bigint not null,        -- everything below it in the partition is settled or waits
    worker     uuid not null,          -- the process that wrote the row
    seen_at    timestamptz not null default now(),
    primary key (handler, topic, partition, error)
);


-- Dead letters ------------------------------------------------------------------------------------------------------

-- Messages that could not be applied, byte for byte.
create table consumer.dead_letters (
    dead_letter   bigint generated always as identity primary key,
    handler       smallint not null references consumer.handlers,
    id            uuid not null,
    fingerprint   bigint not null,
    topic         text not null,
    partition     integer not null,
    "offset"      bigint not null,
    "timestamp"   bigint not null,           -- the record's, in milliseconds
    key           bytea,
    value         bytea,
    header_keys   bytea[] not null,          -- bytes, because a header key need not be UTF-8
    header_values bytea[] not null,
    reason        text not null,
    error         text not null,
    attempts      integer not null,
    died_at       timestamptz not null default now(),
    state         text not null default 'dead',  -- dead, waiting (behind a dead one), applied (by a retry), discarded
    chain         uuid,                      -- the ordering key that it blocks or waits in; null: none, or no longer
    kind          text not null default '',  -- class of the exception, or its SQLSTATE
    error_group   text,                      -- the same for errors of one kind
    trace         text not null default '',  -- where the error was raised: kind, place, schema objects, frames; no values
    seal          bytea,                     -- digests of the record: 16 bytes of its value, 16 of the rest
    unique (handler, id, fingerprint)        -- a replay does not add it again
);
create index dead_letters_chain on consumer.dead_letters (handler, chain, "offset") where chain is not null;
create index dead_letters_open on consumer.dead_letters (handler, dead_letter) where state in ('dead', 'waiting');

-- One row per blocked chain. Adding a dead letter to a chain locks its row FOR SHARE, settling one locks it FOR UPDATE; the
-- row is deleted with the chain's last open dead letter.
create table consumer.held (
    handler   smallint not null references consumer.handlers,
    chain     uuid not null,
    topic     text not null,
    partition integer not null,
    primary key (handler, chain)
);

-- Of messages that have failed and are not settled: how many attempts, and when the next one is due.
create table consumer.attempts (
    handler   smallint not null,
    topic     text not null,
    partition integer not null,
    "offset"  bigint not null,
    attempts  integer not null,
    due_at    timestamptz not null,
    primary key (handler, topic, partition, "offset")
);

-- What operators did to dead letters. Never changed, never deleted.
create table consumer.letter_actions (
    action      bigint generated always as identity primary key,
    dead_letter bigint not null references consumer.dead_letters,
    at          timestamptz not null default now(),
    operator    text not null,
    what        text not null,               -- retry, edit, discard
    outcome     text not null,               -- applied, duplicate, failed, rejected …, discarded
    note        text not null default '',    -- why, or with which error
    new_id      uuid,                        -- of an edit that was a new intent
    new_value   bytea                        -- of an edit
);
create index letter_actions_letter on consumer.letter_actions (dead_letter);

-- Dead letters on their way to the dead-letter topic. A row is deleted when Kafka has acknowledged it.
create table consumer.letters_to_publish (
    dead_letter bigint primary key references consumer.dead_letters
);


-- Shards ------------------------------------------------------------------------------------------------------------

-- An application spread over several databases: which part this one is, and where the route has sent which keys. A route that
-- gives another answer would apply in one shard what another has applied: it is refused at start.
create table consumer.shards (
    app    text primary key,
    shard  text not null,       -- the name of this database
    shards text[] not null,     -- the names of all, sorted
    since  timestamptz not null default now()
);
create table consumer.route_probes (
    app   text not null,
    keyed boolean not null,     -- false: the answer for messages without a key
    key   bytea not null,
    shard text not null,
    primary key (app, keyed, key)
);


-- Functions of the generations --------------------------------------------------------------------------------------

-- A worker's role may not create or drop tables, so these functions run with the rights of their owner. They accept no names
-- from outside. They give up after 50 ms of waiting for a lock, since others would queue behind them.

create function consumer.generation(number integer) returns text
language sql immutable set search_path = pg_catalog, pg_temp
as $$ select case number when 1 then 'only consumer.ledger' else format('consumer.ledger_%s', number) end $$;

-- Whether no claim of that version is running. A claim that begins now reads a newer version and is undone.
create function consumer.is_drained(version integer) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    if not pg_try_advisory_lock(1189079, version) then
        return false;
    end if;
    perform pg_advisory_unlock(1189079, version);
    return true;
end $$;

-- Give every later generation the grants of consumer.ledger.
create function consumer.share_grants() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
    child regclass;
    item record;
begin
    for child in select inhrelid from pg_inherits where inhparent = 'consumer.ledger'::regclass loop
        for item in
            select a.privilege_type as what, '' as columns, a.grantee from pg_class c, aclexplode(c.relacl) a
            where c.oid = 'consumer.ledger'::regclass and a.grantee <> c.relowner
            union all
            select a.privilege_type, format('(%I)', t.attname), a.grantee
            from pg_class c join pg_attribute t on t.attrelid = c.oid, aclexplode(t.attacl) a
            where c.oid = 'consumer.ledger'::regclass and a.grantee <> c.relowner
        loop
            execute format('grant %s %s on %s to %s', item.what, item.columns, child,
                           case item.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(item.grantee)) end);
        end loop;
    end loop;
end $$;

-- One step of a turn, from the version that the caller has seen. Returns what it did (opened, moved, turned), or why it did
-- nothing: busy (another process does it) or waiting (for claims of the version before).
create function consumer.turn(seen integer) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
    state consumer.ledger_state;
    newer integer;
    done  text;
begin
    select * into state from consumer.ledger_state s where s.version = seen for update skip locked;
    if not found then
        return 'busy';
    end if;
    if not consumer.is_drained(state.version - 1) then
        return 'waiting';
    end if;
    newer := state.target + 1;
    if state.turning and not exists (select from consumer.generations where number = newer) then
        update consumer.generations set closed_at = clock_timestamp() where number = state.target - 1;
        update consumer.ledger_state set turning = false;
        done := 'turned';
    elsif state.turning then
        -- A writer that takes no version lock knows no generations: it must have ended, and must not begin again (see below).
        if state.target = 1 and exists (
            select from pg_locks l
            where l.relation = 'consumer.ledger'::regclass and l.mode = 'RowExclusiveLock'
              and l.database = (select oid from pg_database where datname = current_database())
              and not exists (select from pg_locks a where a.locktype = 'advisory' and a.classid = 1189079 and a.pid = l.pid)
        ) then
            return 'waiting';
        end if;
        update consumer.ledger_state set target = newer;
        done := 'moved';
    else
        if state.target = 1 then
            -- A claim that names this constraint knows no generations: from now on it fails instead of missing one.
            alter index if exists consumer.ledger_claim rename to ledger_1_claim;
        end if;
        truncate consumer.turning;  -- unused: the version before is drained, and this one does not insert into it
        execute format('create table consumer.ledger_%s (constraint ledger_%s_claim primary key (handler, id)) inherits (consumer.ledger)',
                       newer, newer);
        perform consumer.share_grants();
        insert into consumer.generations (number, opened_at) values (newer, clock_timestamp());
        update consumer.ledger_state set turning = true;
        done := 'opened';
    end if;
    update consumer.ledger_state set version = version + 1;
    return done;
end $$;

-- Stop looking into the oldest generation, which must be closed, and note how far its rows reach. Returns what it did:
-- carried (moved at most 1,000 of its dead letters into the present generation: call again) or forgotten; or why it did
-- nothing: busy or waiting.
create function consumer.forget(seen integer, wanted integer) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
    state  consumer.ledger_state;
    oldest consumer.generations;
    moved  integer;
begin
    select * into state from consumer.ledger_state s where s.version = seen for update skip locked;
    if not found then
        return 'busy';
    end if;
    select * into oldest from consumer.generations where forgotten_at is null order by number limit 1;
    if oldest.number <> wanted or oldest.closed_at is null then
        return 'busy';
    end if;
    if state.turning or not consumer.is_drained(state.version - 1) then
        return 'waiting';
    end if;
    -- A dead letter keeps its row, so that it can be retried. One that is locked is left to the next call. A claim of the
    -- same id meets the row before or after the move, or waits for this transaction on the target's key.
    execute format($sql$
        with letters as materialized (
            select d.handler, d.id from consumer.dead_letters d
            where exists (select from %1$s l where l.handler = d.handler and l.id = d.id and l.applied_at is null)
            limit 1000 for update of d skip locked
        ), gone as (
            delete from %1$s l using (select distinct handler, id from letters) o
            where l.handler = o.handler and l.id = o.id and l.applied_at is null returning l.*
        )
        insert into consumer.%2$I select * from gone
        $sql$, consumer.generation(wanted), case state.target when 1 then 'ledger' else 'ledger_' || state.target end);
    get diagnostics moved = row_count;
    if moved > 0 then
        return 'carried';
    end if;
    execute format('select count(*) from consumer.dead_letters d join %s l on l.handler = d.handler and l.id = d.id and l.applied_at is null',
                   consumer.generation(wanted)) into moved;
    if moved > 0 then
        return 'waiting';
    end if;
    -- Before any claim stops looking into it: a claim then knows how far the rows reached.
    execute format($sql$
        insert into consumer.forgotten as f (handler, topic, partition, below)
        select handler, topic, partition, max("offset") + 1 from %s group by 1, 2, 3
        on conflict (handler, topic, partition) do update set below = greatest(f.below, excluded.below)
        $sql$, consumer.generation(wanted));
    update consumer.generations set forgotten_at = clock_timestamp() where number = wanted;
    update consumer.ledger_state set version = version + 1, horizon = greatest(horizon, oldest.closed_at);
    return 'forgotten';
end $$;

-- Drop a generation that is forgotten, and count its rows as 'applied' instead of 'kept'. Returns dropped; or busy, or waiting
-- (for claims that may still look into it). Fails with lock_not_available while a query reads the whole ledger.
create function consumer.drop_generation(wanted integer) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
    state consumer.ledger_state;
begin
    select * into state from consumer.ledger_state for update skip locked;
    if not found or not exists (select from consumer.generations where number = wanted and forgotten_at is not null) then
        return 'busy';
    end if;
    if not consumer.is_drained(state.version - 1) then
        return 'waiting';
    end if;
    execute format($sql$
        with gone as materialized (
            select handler, topic, partition, count(*) as n from %s where applied_at is not null group by 1, 2, 3
        )
        insert into consumer.outcomes as t (handler, topic, partition, outcome, count)
        select handler, topic, partition, 'applied', n from gone union all select handler, topic, partition, 'kept', -n from gone
        order by 1, 2, 3, 4
        on conflict (handler, topic, partition, outcome) do update set count = t.count + excluded.count
        $sql$, consumer.generation(wanted));
    if wanted = 1 then
        truncate only consumer.ledger;
    else
        execute format('drop table consumer.ledger_%s', wanted);
    end if;
    delete from consumer.generations where number = wanted;
    return 'dropped';
end $$;

revoke all on function consumer.share_grants(), consumer.turn(integer), consumer.forget(integer, integer),
                       consumer.drop_generation(integer) from public;
