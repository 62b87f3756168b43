-- What `app.publishing` stores in the transactions of web applications, until a worker moves it into a stream.
--
-- A stream numbers its rows under a lock that is held until COMMIT: web requests would wait for each other. Here they only
-- insert. A worker moves the rows that it sees, which are committed, in the order of `place`, and deletes them here in the
-- same transaction. There is no cursor, so a row that is committed late is moved late and never passed; a transaction that
-- stays open delays only its own rows. If a transaction begins to publish after another has committed, its places are higher,
-- and a reader that sees its rows sees those of the earlier transaction too.
create table consumer.outbox_intake (
    app        text not null,
    place      bigint generated always as identity,
    id         uuid not null,
    topic      text not null,
    key        bytea,
    value      bytea,
    headers    jsonb not null default '[]',
    created_at timestamptz not null default now(),
    primary key (app, place)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
