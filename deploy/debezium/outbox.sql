-- What Debezium needs to read the outbox. Run it once, as the owner of the schema; the server needs wal_level = logical.

-- By the parent table: later generations, which are its partitions, are published under its name and without another step.
create publication consumer_outbox for table consumer.outbox with (publish = 'insert', publish_via_partition_root = true);

create role debezium login replication;  -- give it a password, or a certificate
grant usage on schema consumer to debezium;
grant select on consumer.outbox to debezium;
