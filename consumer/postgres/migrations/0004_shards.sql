-- What a database remembers of an application that is spread over several: which part it is, and where the route has sent
-- which keys. A route that answers otherwise would apply in one shard what was applied in another: it is refused at start.

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
