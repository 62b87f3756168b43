-- What other people's SQL, producers, poolers and deployments need the ledger to remember.

-- Which handlers have settled which offsets. Positions are per application, so a handler that is added, removed or that
-- only some workers have during a deployment misses what is settled without it. A worker that opens a partition with
-- other handlers than the position names ends and begins stretches at that position; a position moves only for workers
-- whose handlers it names.
alter table consumer.positions
    add column handlers text,     -- numbers of the handlers that settle from here on, sorted; null: not recorded yet
    add column began_with text;   -- 'group': began where another client of the Kafka group had committed
alter table consumer.handlers add column topics text[] not null default '{}';  -- that it was last registered with
create table consumer.coverage (
    handler      smallint not null references consumer.handlers,
    topic        text not null,
    partition    integer not null,
    first_offset bigint not null,
    past_offset  bigint,                          -- null: up to the position
    why          text not null default 'settled', -- settled, replayed, declared (`consumer positions --begin-here`)
    primary key (handler, topic, partition, first_offset)
);
-- Names that handlers had. A worker that still has an old one is refused.
create table consumer.handler_renames (
    app        text not null,
    old_name   text not null,
    new_name   text not null,
    renamed_at timestamptz not null default now(),
    operator   text not null
);
-- Handlers of before this migration cover their topics since the application began there, where its next worker has them.
alter table consumer.handlers add column legacy boolean not null default false;
update consumer.handlers h set legacy = true, topics = array(
    select t.name from consumer.topics t
    where t.topic = (select l.topic from consumer.ledger l where l.handler = h.handler limit 1));
-- How each handler identifies its messages (core/identity.rule_text), as it was first registered or last accepted; null: not
-- known yet. After an accepted change, messages below an offset may have ids of an earlier rule.
alter table consumer.handlers add column id_rule text;
create table consumer.id_rule_changes (
    handler   smallint not null references consumer.handlers on delete cascade,
    topic     text not null,
    partition integer not null,
    below     bigint not null,
    primary key (handler, topic, partition)
);
-- Partitions that workers cannot read, and why. Written when one stops, deleted when it goes on.
create table consumer.stopped_partitions (
    app          text not null,
    topic        text not null,
    partition    integer not null,
    reason       text not null,              -- of core/incarnation.Reason
    why          text not null,
    "do"         text not null,              -- options of `consumer positions`, or an instruction in words
    first_offset bigint not null,
    last_offset  bigint not null,
    since        timestamptz not null default now(),
    primary key (app, topic, partition)
);
-- Counts the holds that somebody else than a partition's owner has made (`replay --apply`): the owner's next batch finds another
-- number, is undone, and reads the holds again.
alter table consumer.positions add column holds integer not null default 0;

-- The end of what was settled in each log when rows of it were dropped: judges records whose timestamps say nothing. What was
-- dropped before this migration is taken to reach up to what is settled now.
create table consumer.forgotten (
    handler   smallint not null,
    topic     smallint not null,
    partition integer not null,
    below     bigint not null,
    primary key (handler, topic, partition)
);
insert into consumer.forgotten (handler, topic, partition, below)
select handler, topic, partition, max(below) from (
    select handler, topic, partition, max("offset") + 1 as below from consumer.ledger
    where exists (select from consumer.ledger_state where horizon is not null) group by 1, 2, 3
    union all
    select h.handler, t.topic, p.partition, p.next_offset
    from consumer.positions p join consumer.topics t on t.name = p.topic join consumer.handlers h using (app)
    where exists (select from consumer.ledger_state where horizon is not null)
) as settled group by 1, 2, 3;

-- As in migration 5, and notes how far the rows of the generation reach before no claim looks into it any more.
create or replace function consumer.forget(seen integer, wanted integer) returns text
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
    execute format($sql$
        insert into consumer.forgotten as f (handler, topic, partition, below)
        select handler, topic, partition, max("offset") + 1 from %s group by 1, 2, 3
        on conflict (handler, topic, partition) do update set below = greatest(f.below, excluded.below)
        $sql$, consumer.generation(wanted));
    update consumer.generations set forgotten_at = clock_timestamp() where number = wanted;
    update consumer.ledger_state set version = version + 1, horizon = greatest(horizon, oldest.closed_at);
    return 'forgotten';
end $$;

-- What waits now, and why: written by the worker that has the partition, on change and every few seconds while it lasts,
-- so that any process can report it. Rows that nobody renews have expired; those of a worker that stopped for good stay.
create table consumer.waiting (
    handler    smallint not null references consumer.handlers,
    topic      text not null,
    partition  integer not null,
    error      text not null,          -- kind, place and schema objects; never a value
    count      bigint not null,        -- messages that failed so, and those behind them
    since      timestamptz not null,
    systemic   boolean not null,       -- every message of the handler fails so
    read_up_to bigint not null,        -- of the partition: everything below is settled or waits
    worker     uuid not null,          -- the process that wrote it
    seen_at    timestamptz not null default now(),
    primary key (handler, topic, partition, error)
);

-- Where a dead letter's error was raised: kind, place and schema objects, then the frames; no values.
alter table consumer.dead_letters add column trace text not null default '';

-- Applied messages of the ledger's present rows, counted as outcome 'kept', so that nobody has to count rows. Those of
-- dropped generations are 'applied', as before.
insert into consumer.outcomes as t (handler, topic, partition, outcome, count)
select handler, topic, partition, 'kept', count(*) from consumer.ledger where applied_at is not null group by 1, 2, 3
on conflict (handler, topic, partition, outcome) do update set count = t.count + excluded.count;

create or replace function consumer.drop_generation(wanted integer) returns text
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

-- Digests of the record that a letter was made of: 16 bytes of its value, 16 of the rest. None in letters from before.
alter table consumer.dead_letters add column seal bytea;

-- Which code each handler had, and when: fingerprints of the source (consumer/handler_code.py) or the handler's version=. Written
-- when a worker starts, and every few minutes while it runs.
create table consumer.handler_code (
    handler    smallint not null references consumer.handlers on delete cascade,
    code       text not null,               -- of everything that the handler does
    id_code    text not null,               -- of the function of message_id= alone; '' where it is none
    first_seen timestamptz not null default now(),
    last_seen  timestamptz not null default now(),
    primary key (handler, code, id_code)
);
