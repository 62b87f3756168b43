-- What operators do: one record of their actions, and what they have paused.
--
-- From here on, workers of the previous version go on beside a migrated schema. A migration takes no lock on a table of
-- theirs that makes them wait: no ALTER TABLE, no foreign key to one of them, no index on one of them.

-- Every action of an operator, in the transaction of the action where it is one. Never changed, never deleted.
-- No part of a message is in it: what may quote one is in letter_results.
create table consumer.audit (
    entry       bigint generated always as identity primary key,
    at          timestamptz not null default now(),
    app         text,                                 -- null: it concerns every application of the database
    operator    text not null,                        -- as the command said, else the user of the operating system
    db_user     text not null default session_user,
    action      text not null,                        -- the command: ACTIONS in core/audit.py
    why         text not null default '',
    result      text not null,
    topic       text,
    partition   integer,
    dead_letter bigint,
    stream      integer,                              -- of the outbox
    numbers     jsonb not null default '{}'           -- counts, positions
);
create index audit_app on consumer.audit (app, entry);
create index audit_letter on consumer.audit (dead_letter, entry) where dead_letter is not null;
create index audit_stream on consumer.audit (stream, entry) where stream is not null;

-- What an action on a dead letter left behind that may quote its message.
create table consumer.letter_results (
    entry     bigint primary key references consumer.audit,
    note      text not null default '',   -- the error of an attempt
    new_id    uuid,                       -- of an edit that was a new intent
    new_value bytea                       -- of an edit
);

-- Actions were in two tables before. What is in them moves; what commands of the previous version still insert is recorded
-- in the new one instead. (Dropping these tables would lock those that they refer to: a later version does it.)
create function consumer.record_letter_action() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
    number bigint;
begin
    insert into consumer.audit (at, app, operator, action, why, result, topic, partition, dead_letter)
    select new.at, h.app, new.operator, 'dlq ' || new.what, case new.what when 'discard' then new.note else '' end, new.outcome,
           d.topic, d.partition, new.dead_letter
    from consumer.dead_letters d join consumer.handlers h using (handler) where d.dead_letter = new.dead_letter
    returning entry into number;
    if new.new_id is not null or new.new_value is not null or (new.what <> 'discard' and new.note <> '') then
        insert into consumer.letter_results values (number, new.note, new.new_id, new.new_value);
    end if;
    return null;
end $$;
create function consumer.record_outbox_action() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into consumer.audit (at, app, operator, action, why, result, topic, stream, numbers)
    select new.at, s.app, new.operator, 'outbox ' || new.what, new.why, 'resumed', s.topic, new.stream,
           jsonb_build_object('from_seq', new.from_seq, 'to_seq', new.to_seq)
    from consumer.outbox_streams s where s.stream = new.stream;
    return null;
end $$;
revoke all on function consumer.record_letter_action(), consumer.record_outbox_action() from public;

insert into consumer.audit (entry, at, app, operator, db_user, action, why, result, topic, partition, dead_letter)
overriding system value
select a.action, a.at, h.app, a.operator, '', 'dlq ' || a.what, case a.what when 'discard' then a.note else '' end, a.outcome,
       d.topic, d.partition, a.dead_letter
from consumer.letter_actions a join consumer.dead_letters d using (dead_letter) join consumer.handlers h using (handler);
insert into consumer.letter_results (entry, note, new_id, new_value)
select action, case what when 'discard' then '' else note end, new_id, new_value from consumer.letter_actions
where new_id is not null or new_value is not null or (what <> 'discard' and note <> '');
select setval(pg_get_serial_sequence('consumer.audit', 'entry'), greatest((select max(entry) from consumer.audit), 1));
insert into consumer.audit (at, app, operator, db_user, action, why, result, topic, stream, numbers)
select a.at, s.app, a.operator, '', 'outbox ' || a.what, a.why, 'resumed', s.topic, a.stream,
       jsonb_build_object('from_seq', a.from_seq, 'to_seq', a.to_seq)
from consumer.outbox_actions a join consumer.outbox_streams s using (stream) order by a.action;
delete from consumer.letter_actions;
delete from consumer.outbox_actions;
create trigger moved before insert on consumer.letter_actions for each row execute function consumer.record_letter_action();
create trigger moved before insert on consumer.outbox_actions for each row execute function consumer.record_outbox_action();

-- What workers must not settle. A worker reads it every few seconds, and before it opens partitions.
create table consumer.pauses (
    app       text not null,
    topic     text not null,        -- empty: all
    partition integer not null,     -- -1: all
    operator  text not null,
    why       text not null,
    since     timestamptz not null default now(),
    primary key (app, topic, partition)
);

-- Erase the messages of dead letters, and what quotes them: keys, payloads, headers, errors, edits. The rows stay, with
-- their ids, states and order; an empty seal marks them. A function, because a worker's role may not change payloads.
-- Returns the dead letters that were not erased before.
create function consumer.erase_letters(letters bigint[]) returns setof bigint
language sql security definer set search_path = pg_catalog, pg_temp
as $$
    with quotes as (
        update consumer.letter_results r set note = '', new_value = null from consumer.audit a
        where a.entry = r.entry and a.dead_letter = any(letters)
    )
    update consumer.dead_letters set key = null, value = null, header_keys = '{}', header_values = '{}', error = '', trace = '',
           seal = ''
    where dead_letter = any(letters) and seal is distinct from '' returning dead_letter
$$;
revoke all on function consumer.erase_letters(bigint[]) from public;
