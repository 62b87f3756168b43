-- The payment page's own tables. charges has no unique key on purpose: were a payment applied twice, it would show.

create schema shop;

create table shop.orders (
    order_id  uuid primary key,
    visitor   uuid not null,
    protected boolean not null,                      -- false: of the sandbox, where nothing asks the ledger
    amount    bigint not null,                       -- cents
    state     text not null default 'placed' check (state in ('placed', 'paid', 'shipped', 'delivered')),
    version   bigint not null default 1,
    moved_at  timestamptz not null default now()
);

create table shop.accounts (
    visitor   uuid not null,
    protected boolean not null,                      -- a visitor has two: the sandbox's is another one
    balance   bigint not null,                       -- cents
    primary key (visitor, protected)
);

create table shop.charges (
    charge          bigint generated always as identity,
    order_id        uuid not null,
    protected       boolean not null,
    amount          bigint not null,                 -- cents
    topic_partition int not null,
    topic_offset    bigint not null
);
create index on shop.charges (order_id);
