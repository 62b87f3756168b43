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
