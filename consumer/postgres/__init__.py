"""PostgreSQL: connections, the ledger and every table of the framework.

The only package that imports asyncpg. Imports core, logs, settings, tls and deferred_writes.
"""
