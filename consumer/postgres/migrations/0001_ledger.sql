-- What the framework keeps. One schema for all applications of a database; names are scoped by application.

create schema if not exists consumer;

-- One row, made here: part of the epoch, so that a database made anew is not taken for the one before it.
create table consumer.installation (
    only_one boolean primary key default true check (only_one),
    nonce    uuid not null default gen_random_uuid(),
    made_at  timestamptz not null default now()
);
insert into consumer.installation default values;

-- Names once, numbers in the ledger: 2 bytes a row instead of a name.
create table consumer.handlers (
    handler smallint generated always as identity primary key,
    app     text not null,
    name    text not null,
    unique (app, name)
);
create table consumer.topics (
    topic smallint generated always as identity primary key,
    name  text not null unique
);

-- The claim: one row for each handler and message id. The primary key is the guarantee.
-- Widest columns first, so that no byte goes to padding (72 bytes a row and its header).
create table consumer.ledger (
    fingerprint bigint not null,              -- of the payload: an id used again with another payload is a conflict
    "offset"    bigint not null,              -- where it was first seen
    applied_at  timestamptz,                  -- null: the message is a dead letter, and has no effects
    partition   integer not null,
    handler     smallint not null,
    topic       smallint not null,
    id          uuid not null,
    constraint ledger_claim primary key (handler, id)
);

-- Everything below next_offset is settled for every handler of the application. Kafka's own committed offset is a copy.
create table consumer.positions (
    app         text not null,
    topic       text not null,
    partition   integer not null,
    next_offset bigint not null,
    updated_at  timestamptz not null default now(),
    primary key (app, topic, partition)
) with (fillfactor = 50);

-- How messages ended, other than applied (the ledger counts those): written with the position, so it counts each once.
-- A row for each partition, because two workers that updated one row would wait for each other.
create table consumer.outcomes (
    handler   smallint not null,
    topic     smallint not null,
    partition integer not null,
    outcome   text not null,
    count     bigint not null,
    primary key (handler, topic, partition, outcome)
) with (fillfactor = 50);

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
    unique (handler, id, fingerprint)        -- a replay does not add it again
);
