"""Kafka: fetching, the group, reading a log.

The only package that imports aiokafka. Imports core, logs, settings and tls.
"""
