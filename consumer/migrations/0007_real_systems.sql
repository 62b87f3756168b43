-- What other people's SQL, producers, poolers and deployments need the ledger to remember.

select;  -- asyncpg 0.31 cannot run a text without a statement
