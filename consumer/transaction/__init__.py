"""The guarantee: one transaction for all of a batch.

apply.py holds the steps, settle.py the loop around them. Imports core, postgres and deferred_writes; never Kafka or
Redis.
"""
