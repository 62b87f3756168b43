-- Where the application began in a partition: below it the ledger knows nothing, so a replay cannot tell what is missing
-- there. Null where that was not recorded (a position of version 1).

alter table consumer.positions add column first_offset bigint;
