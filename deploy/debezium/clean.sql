-- Drops the generations of the outbox that Debezium has read. Run it every 15 minutes, as the owner of the schema.
--
-- Every row below a stream's next_seq was committed before the position in the log that is read after it. So once the slot has
-- confirmed that position, Kafka has all of them. It waits for that for outbox.wait_seconds (60), and changes nothing until
-- then.
do $$
declare
    streams  integer[];
    ends     bigint[];
    written  pg_lsn;
    deadline constant timestamptz :=
        clock_timestamp() + make_interval(secs => coalesce(nullif(current_setting('outbox.wait_seconds', true), ''), '60')::float8);
begin
    select array_agg(stream), array_agg(next_seq) into streams, ends from consumer.outbox_streams;
    written := pg_current_wal_insert_lsn();
    loop
        exit when exists (select from pg_replication_slots
                          where slot_name = 'consumer_outbox' and database = current_database() and confirmed_flush_lsn >= written);
        if clock_timestamp() > deadline then
            raise notice 'debezium has not confirmed what is written: nothing is dropped';
            return;
        end if;
        perform pg_sleep(0.5);
    end loop;
    update consumer.outbox_published p set next_seq = w.next_seq, updated_at = now()
    from unnest(streams, ends) as w(stream, next_seq) where p.stream = w.stream and p.next_seq < w.next_seq;
end $$;
select consumer.turn_outbox(900, 1073741824);
select consumer.drop_outbox(0);
