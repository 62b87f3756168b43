-- Dead letters that hold back what comes after them, attempts that outlive their worker, and a record of what people did.

alter table consumer.dead_letters
    add column state text not null default 'dead',  -- dead, waiting (behind a dead one), applied (by a retry), discarded
    add column chain uuid,                          -- which unit of order it holds or waits in; null: none, or no longer
    add column kind text not null default '',       -- class of the exception, or its SQLSTATE
    add column error_group text;                    -- the same for errors of one kind
create index dead_letters_chain on consumer.dead_letters (handler, chain, "offset") where chain is not null;
create index dead_letters_open on consumer.dead_letters (handler, dead_letter) where state in ('dead', 'waiting');

-- One row for each chain that is held. Whoever adds a letter to a chain locks its row FOR SHARE, whoever settles one FOR UPDATE;
-- it goes with the last letter.
create table consumer.held (
    handler   smallint not null references consumer.handlers,
    chain     uuid not null,
    topic     text not null,
    partition integer not null,
    primary key (handler, chain)
);

-- Of messages that have failed and are not settled: how often, and when they are due.
create table consumer.attempts (
    handler   smallint not null,
    topic     text not null,
    partition integer not null,
    "offset"  bigint not null,
    attempts  integer not null,
    due_at    timestamptz not null,
    primary key (handler, topic, partition, "offset")
);

-- What was done to letters, by whom. Never changed, never deleted.
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

-- Letters on their way to the dead-letter topic; the row goes when Kafka has acknowledged it.
create table consumer.letters_to_publish (
    dead_letter bigint primary key references consumer.dead_letters
);
