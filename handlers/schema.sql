-- The example's own tables: `consumer migrate --file handlers/schema.sql`. Written so that it may run again.
-- payments, receipts and bookings have no unique key on purpose: were a message applied twice, a sum would show it.

create table if not exists accounts (
    account int primary key,
    balance bigint not null default 0                -- cents
);
insert into accounts (account) select generate_series(0, 999) on conflict do nothing;

create table if not exists payments (
    payment_id uuid not null,
    account    int not null references accounts,
    amount     bigint not null,
    refunded   bigint not null default 0
);
create index if not exists payments_payment_id on payments (payment_id);

create table if not exists receipts (
    receipt         bigint generated always as identity,
    payment_id      uuid not null,
    account         int not null,
    topic_partition int not null,
    topic_offset    bigint not null
);

create table if not exists bookings (
    entry_id text not null,
    account  int not null,
    amount   bigint not null
);

create table if not exists audit_trail (
    topic           text not null,
    topic_partition int not null,
    topic_offset    bigint not null,
    sha256          bytea not null
);
