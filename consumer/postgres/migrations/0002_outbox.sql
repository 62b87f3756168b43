-- The outbox: what handlers publish, stored in the transaction of their message, until Kafka has acknowledged it.

-- One row per input partition and output topic: the rows of a stream keep their order, and a stream may stop alone.
-- Rows are numbered under the row's lock, which is held until COMMIT: in the order of commits, without gaps.
create table consumer.outbox_streams (
    stream           integer generated always as identity primary key,
    app              text not null,
    source_topic     text not null,
    source_partition integer not null,
    topic            text not null,            -- where its rows are published
    next_seq         bigint not null default 0,
    unique (app, source_topic, source_partition, topic)
) with (fillfactor = 50);

-- How far each stream is published. Apart from next_seq, so that who stores rows and who publishes them never wait for
-- each other.
create table consumer.outbox_published (
    stream     integer primary key references consumer.outbox_streams,
    next_seq   bigint not null default 0,      -- all rows below are acknowledged by Kafka, or discarded
    stopped    text,                           -- why nothing more is published; null: it goes on
    stopped_at timestamptz,
    updated_at timestamptz not null default now()
) with (fillfactor = 50);

-- The rows are inserted and read, never updated or deleted: whole generations are dropped. Declarative partitions, so that
-- a publication for logical replication takes later generations too.
create table consumer.outbox (
    generation    integer not null,
    stream        integer not null,
    seq           bigint not null,
    id            uuid not null,               -- header message-id
    topic         text not null,
    key           bytea,
    value         bytea,
    headers       jsonb not null default '[]', -- [[name, text]]; {"base64": …} instead of a text that is no UTF-8
    type          text,                        -- the header ce_type, for relays that send columns only
    traceparent   text,
    tracestate    text,
    created_at    timestamptz not null default now(),  -- the record's timestamp
    handler       smallint,                    -- which message published it
    source_offset bigint,
    primary key (stream, seq, generation)
) partition by list (generation);

-- Rows go into the generation that is not closed. An earlier one is dropped when all of its rows are published.
create table consumer.outbox_generations (
    generation integer primary key,
    opened_at  timestamptz not null default now(),
    closed_at  timestamptz
);
insert into consumer.outbox_generations (generation) values (1);
do $$ begin
    create table consumer.outbox_1 partition of consumer.outbox for values in (1);
end $$;

-- What operators did to streams. Never changed, never deleted.
create table consumer.outbox_actions (
    action   bigint generated always as identity primary key,
    stream   integer not null references consumer.outbox_streams,
    at       timestamptz not null default now(),
    operator text not null,
    what     text not null,                    -- resume, discard
    from_seq bigint not null,                  -- the first row that was not published
    to_seq   bigint not null,                  -- rows from_seq to to_seq - 1 were discarded
    why      text not null
);

-- Open the next generation if the present one has rows and is older than `seconds` or larger than `bytes`. Returns turned;
-- or young, empty, or busy (another process is at work).
create function consumer.turn_outbox(seconds double precision, bytes bigint) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
    present consumer.outbox_generations;
    is_used boolean;
begin
    select * into present from consumer.outbox_generations where closed_at is null for update skip locked;
    if not found then
        return 'busy';
    end if;
    if present.opened_at > clock_timestamp() - make_interval(secs => seconds)
       and pg_total_relation_size(format('consumer.outbox_%s', present.generation)) < bytes then
        return 'young';
    end if;
    execute format('select exists (select from consumer.outbox_%s)', present.generation) into is_used;
    if not is_used then
        return 'empty';
    end if;
    -- ATTACH does not wait for transactions that insert, as CREATE TABLE … PARTITION OF would.
    execute format('create table consumer.outbox_%s (like consumer.outbox including all)', present.generation + 1);
    execute format('alter table consumer.outbox attach partition consumer.outbox_%1$s for values in (%1$s)',
                   present.generation + 1);
    update consumer.outbox_generations set closed_at = clock_timestamp() where generation = present.generation;
    insert into consumer.outbox_generations (generation, opened_at) values (present.generation + 1, clock_timestamp());
    return 'turned';
exception when lock_not_available then
    return 'busy';
end $$;

-- Drop the oldest generation that was closed `keep_seconds` ago, once all of its rows are published. Returns dropped; or
-- nothing, unpublished, or busy.
--
-- Every transaction that inserts into the outbox locks the parent table until its end, and reads which generation is open
-- after it has that lock. So once this function has the exclusive lock, no transaction is left that inserts into a closed
-- generation, and it sees every row. It waits for at most 50 ms, since inserts queue behind it; the search for rows that are
-- not published is one probe of the index for each stream.
create function consumer.drop_outbox(keep_seconds double precision) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '50ms'
as $$
declare
    oldest  integer;
    is_open boolean;
    has_unpublished constant text := $sql$
        select exists (
            select from consumer.outbox_streams s left join consumer.outbox_published p using (stream)
            where exists (select from consumer.outbox_%s o where o.stream = s.stream and o.seq >= coalesce(p.next_seq, 0)))
        $sql$;
begin
    select generation into oldest from consumer.outbox_generations
    where closed_at <= clock_timestamp() - make_interval(secs => keep_seconds)
    order by generation limit 1 for update skip locked;
    if not found then
        return 'nothing';
    end if;
    execute format(has_unpublished, oldest) into is_open;  -- before anything is locked
    if is_open then
        return 'unpublished';
    end if;
    lock table consumer.outbox in access exclusive mode;
    execute format(has_unpublished, oldest) into is_open;
    if is_open then
        return 'unpublished';
    end if;
    execute format('drop table consumer.outbox_%s', oldest);
    delete from consumer.outbox_generations where generation = oldest;
    return 'dropped';
exception when lock_not_available then
    return 'busy';
end $$;

revoke all on function consumer.turn_outbox(double precision, bigint), consumer.drop_outbox(double precision) from public;
