-- Which log a position is of, since another one may have the same name and the same offsets. Null where it was not recorded.

alter table consumer.positions
    add column cluster_id text,            -- of Kafka, as it names itself
    add column topic_id uuid,              -- of the topic: one that is deleted and made anew gets another
    add column salt bytea,                 -- part of ids made of offsets; null for the first log of this name
    add column seen_offset bigint,         -- a record that was settled, which is to be found at its offset again
    add column seen_timestamp bigint,
    add column seen_fingerprint bigint;
