-- The ledger in generations, so that old rows go by whole tables and never by DELETE. consumer.ledger itself is the first
-- generation, and the parent of the later ones, consumer.ledger_2 and so on: who reads it, reads all of them. A claim goes
-- into one generation and is looked for in the others. What is altered here holds up nobody, and a worker of the version
-- before goes on, until the first turn.
--
-- A turn must not let the same id be claimed in two generations by two transactions that do not see each other. Nobody is
-- made to wait for that, since a batch with slow handlers may take seconds. Instead a turn goes through four versions of
-- what a claim inserts into, each of which shares a table, and so a unique key, with its neighbours:
--
--     version    inserts into          looks into      target  turning
--     v          N                     older           N       no
--     v + 1      turning, then N       older           N       yes
--     v + 2      turning, then N + 1   N and older     N + 1   yes
--     v + 3      N + 1                 N and older     N + 1   no
--
-- A claim holds its version's shared advisory lock until its transaction ends, and reads the version again after it has the
-- lock: if it is another one, it is undone. The version is raised only when nobody holds the lock of the version before the
-- present one (who takes it later reads the present one, and is undone). So two claims that run at the same time are of the
-- same version or of neighbours, and meet on a unique key. Claims of v that have ended before v + 2 began are seen by those
-- of v + 2, which look into N.

create table consumer.generations (
    number       integer primary key,
    opened_at    timestamptz not null default now(),
    closed_at    timestamptz,        -- every claim in it was made before
    forgotten_at timestamptz         -- no claim looks into it; the table goes as soon as nobody holds it
);
insert into consumer.generations (number) values (1);

create table consumer.ledger_state (
    only_one boolean primary key default true check (only_one),
    version  integer not null default 1,
    target   integer not null default 1 references consumer.generations,
    turning  boolean not null default false,
    horizon  timestamptz             -- rows that were made until then may be gone; null: none are
);
insert into consumer.ledger_state default values;

-- Where claims meet during a turn. Emptied before the next one.
create table consumer.turning (
    handler smallint not null,
    id      uuid not null,
    primary key (handler, id)
);

-- How long each application wants its rows to be kept, as it said when it was started last; null: for ever.
create table consumer.retention (
    app      text primary key,
    hours    double precision,
    said_at  timestamptz not null default now()
);

-- Functions, because a worker's role may not create or drop tables. They run with the rights of their owner, take no names
-- from outside, and give up after 50 ms where they would wait, since others would queue behind them.

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

-- One step of a turn, from the version that the caller has seen. Says what was done: opened, moved or turned; or why not:
-- busy (another one is at it) or waiting (for claims of the version before).
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
        -- Workers of the version before migration 5 know no lock: they must have ended, and begin no more (see below).
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
            -- Their claims name this constraint: from now on they end in an error instead of missing a generation.
            alter index if exists consumer.ledger_claim rename to ledger_1_claim;
        end if;
        truncate consumer.turning;  -- nobody can be using it: the version before is drained, and this one does not
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

-- Look no more into the oldest generation, which must be closed. Says what was done: carried (dead letters of it, at most
-- 1,000, went into the present generation: call again) or forgotten; or why not: busy or waiting.
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
    -- A dead letter stays one, and can be retried. A letter that somebody is at is left for the next call; a claim of the
    -- same id meets the row before or after it was moved, or waits for this transaction on the target's key.
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
    update consumer.generations set forgotten_at = clock_timestamp() where number = wanted;
    update consumer.ledger_state set version = version + 1, horizon = greatest(horizon, oldest.closed_at);
    return 'forgotten';
end $$;

-- Drop a generation that is forgotten. What it held is added to the counts. Says dropped; or busy, or waiting for claims
-- that may still look into it. Fails with lock_not_available while somebody reads the whole ledger.
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
        insert into consumer.outcomes as t (handler, topic, partition, outcome, count)
        select handler, topic, partition, 'applied', count(*) from %s where applied_at is not null group by 1, 2, 3
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
